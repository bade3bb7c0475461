"""The linear algebra of the method: tensors in, tensors out, float64 inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .eigen import CholeskyWhitening, SingularError, Whitening, leading_pairs
from .scatter import MatrixScatter, RowScatter, SecondMoments

SUMS = ("mean", "origin", "fourth", "third")  # of a `RunningCovariance`
SYMMETRY = 1e-8  # relative asymmetry that still counts as rounding


class RunningCovariance:
    """Mean and covariance of a stream of vectors, in memory n x d for n < d vectors, then d x d however many there are.

    Chunks are merged about the running mean (Chan, Golub and LeVeque), so that a mean far from 0 costs no digits. What
    the Ledoit-Wolf shrinkage needs beyond that, a sum of fourth powers, is streamed about the first chunk's mean, and
    about it the rows are kept while they are few.

    Args:
        dimension: d.
        device: where the sums are kept until the first chunk; then where the chunks are.
    """

    def __init__(self, dimension: int, device: torch.device | str | None = None):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean = zeros(dimension)  # (d,)
        self.origin = zeros(dimension)  # y = x - origin below
        self.fourth = zeros()  # sum of |y|^4
        self.third = zeros(dimension)  # sum of |y|^2 y
        self._rows: list[torch.Tensor] | None = [zeros(0, dimension)]  # all y, or None once there is a matrix:
        self._matrix: torch.Tensor | None = None  # the sum of (x - mean)(x - mean)^T

    def update(self, chunk: torch.Tensor) -> None:
        """Take in `chunk` (n, d), any floating dtype; n may be 0.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if chunk.ndim != 2 or chunk.shape[1] != len(self.mean):
            raise ValueError(f"A chunk of shape {tuple(chunk.shape)} does not fit; expected (n, {len(self.mean)}).")
        if len(chunk) == 0:
            return
        if not torch.isfinite(chunk).all():
            raise ValueError("A chunk holds values that are not finite; check the activations that it comes from.")
        self.to(chunk.device)  # what was read from a file lies elsewhere
        chunk = chunk.to(self.mean)
        if self.count == 0:
            self.origin = chunk.mean(dim=0)
        shifted = chunk - self.origin
        squares = shifted.square().sum(dim=1)
        self.fourth = self.fourth + squares.square().sum()
        self.third = self.third + squares @ shifted
        if self._rows is not None and self.count + len(chunk) >= len(self.mean):
            self._matrix, self._rows = self.scatter.matrix(), None
        self._add(chunk, shifted)

    def to(self, device: torch.device | str) -> None:
        """Move the sums there."""
        for name in SUMS:
            setattr(self, name, getattr(self, name).to(device))
        if self._rows is not None:
            self._rows = [rows.to(device) for rows in self._rows]
        else:
            self._matrix = self._matrix.to(device)

    def _add(self, chunk: torch.Tensor, shifted: torch.Tensor) -> None:
        total = self.count + len(chunk)
        mean = chunk.mean(dim=0)
        step = mean - self.mean
        if self._rows is not None:
            self._rows.append(shifted)
        else:  # in place: of large d, no more than one matrix should be alive
            centred = chunk - mean
            self._matrix.addmm_(centred.mT, centred)
            self._matrix.addr_(step, step, alpha=self.count * len(chunk) / total)
        self.mean = self.mean + step * (len(chunk) / total)
        self.count = total

    @property
    def scatter(self) -> RowScatter | MatrixScatter:
        """The sum of ``(x - mean)(x - mean)^T``, as rows or as a matrix."""
        if self._matrix is not None:
            return MatrixScatter(self._matrix)
        return RowScatter(self._kept_rows())

    def _kept_rows(self) -> torch.Tensor:
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0]

    def covariance(self, about: torch.Tensor | None = None) -> torch.Tensor:
        """Covariance (d, d), divided by n, about the own mean, or second moments about the vector `about` (d,).

        Raises:
            ValueError: nothing has been taken in.
        """
        self._check_not_empty()
        covariance = self.scatter.matrix() / self.count
        if about is None:
            return covariance
        step = self.mean - about.to(self.mean)
        return covariance.addr_(step, step)

    def moments(self, about: torch.Tensor | None = None) -> SecondMoments:
        """What `covariance` gives, for products with it; no d x d matrix is made.

        Raises:
            ValueError: nothing has been taken in.
        """
        self._check_not_empty()
        step = torch.zeros_like(self.mean) if about is None else self.mean - about.to(self.mean)
        return SecondMoments(self.scatter, self.count, step)

    def ridge(self, shrinkage: float) -> float:
        """``s tr(C) / d``, what `shrink` adds to every variance."""
        return shrinkage * float(self.scatter.trace()) / (self.count * len(self.mean))

    def whitening(self, shrinkage: float) -> Whitening:
        """Of the covariance, shrunk as by `shrink`.

        Raises:
            ValueError: nothing has been taken in, or the shrunk covariance is singular.
        """
        self._check_not_empty()
        with _singular_explained():
            return self.scatter.whitening((1 - shrinkage) / self.count, self.ridge(shrinkage))

    def ledoit_wolf_shrinkage(self) -> float:
        """The share of the scaled identity that Ledoit and Wolf (2004) find best for the covariance about the own mean.

        Raises:
            ValueError: nothing has been taken in.
        """
        self._check_not_empty()
        n, d, scatter = self.count, len(self.mean), self.scatter
        # Sum of |x - mean|^4 from sums about the origin: |y - m|^2 = |y|^2 - 2 m.y + |m|^2 with m = mean - origin, and
        # the sum of y y^T is S + n m m^T.
        m = self.mean - self.origin
        norm, trace = m @ m, scatter.trace()
        moved = m @ scatter.product(m[:, None])[:, 0]
        fourth = self.fourth + 4 * moved - 4 * m @ self.third + 2 * norm * trace + 3 * n * norm**2
        squares = (scatter.norm() / n).square()
        delta = squares / d - (trace / n / d) ** 2
        beta = (fourth / n - squares) / (n * d)
        return float((beta.clamp(min=0) / delta).clamp(max=1)) if delta > 0 else 0.0

    def _check_not_empty(self) -> None:
        if self.count == 0:
            raise ValueError("No vectors were taken in, so there is no covariance.")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, as tensors: "rows" or, once there are d, "scatter" among them."""
        kept = {"scatter": self._matrix} if self._rows is None else {"rows": self._kept_rows()}
        return {"count": torch.tensor(self.count), **{name: getattr(self, name) for name in SUMS}, **kept}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunningCovariance":
        """Take up where `state_dict` left off.

        Raises:
            KeyError: a tensor is missing.
        """
        running = cls(len(state["mean"]))
        running.count = int(state["count"])
        for name in SUMS:
            setattr(running, name, state[name].clone())
        if "rows" in state:
            running._rows = [state["rows"].clone()]
        else:  # always so in files of before rows were kept
            running._rows, running._matrix = None, state["scatter"].clone()
        return running

    def merge(self, other: "RunningCovariance") -> None:
        """Take in all that `other` has, as if its chunks had come after the own; `other` stays as it is.

        Raises:
            ValueError: it is of another dimension.
        """
        if len(other.mean) != len(self.mean):
            raise ValueError(f"Moments of dimension {len(other.mean)} do not fit those of {len(self.mean)}.")
        if other.count == 0:
            return
        theirs = RunningCovariance.from_state(other.state_dict())
        theirs.to(self.mean.device)
        if self.count == 0:  # to the last bit, so that what goes on from a file is as if it had not been interrupted
            self.__dict__.update(theirs.__dict__)
            return
        if theirs._matrix is None:
            self.update(theirs._kept_rows() + theirs.origin)
            return
        if self._rows is not None:
            self._matrix, self._rows = self.scatter.matrix(), None
        # Their sums of y = x - origin, taken about this origin: of y + s.
        n, s, m = theirs.count, theirs.origin - self.origin, theirs.mean - theirs.origin
        second = theirs._matrix.addr(m, m, alpha=n)  # sum of y y^T
        norm, along, trace, moved = s @ s, s @ m, second.trace(), second @ s
        fourth = theirs.fourth + 4 * s @ moved + n * norm**2
        self.fourth = self.fourth + fourth + 4 * s @ theirs.third + 2 * norm * trace + 4 * n * norm * along
        self.third = self.third + theirs.third + 2 * moved + s * (trace + 2 * n * along + n * norm) + n * norm * m
        step, total = theirs.mean - self.mean, self.count + n
        self._matrix = (self._matrix + theirs._matrix).addr_(step, step, alpha=self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total


def shrink(covariance: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """``(1 - s) C + s tr(C) / d I``, (d, d)."""
    d = len(covariance)
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * identity


def generalized_eigh(malicious: torch.Tensor, benign: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rank` largest solutions of ``C_m u = lambda C_b u`` (arXiv 2603.27240, step 3).

    Args:
        malicious: C_m, symmetric (d, d).
        benign: C_b, symmetric positive definite (d, d).
        rank: k.

    Returns:
        Eigenvalues (k,), largest first, and vectors (d, k) with ``U^T C_b U = I``, float64; the entry of largest
        magnitude of each vector is positive, so that equal input gives equal signs.

    Raises:
        ValueError: a matrix is not finite or not symmetric, C_b is not positive definite, or 1 <= k <= d does not hold.
    """
    d = len(benign)
    if not 1 <= rank <= d:
        raise ValueError(f"rank={rank} must lie between 1 and d={d}.")
    malicious, benign = malicious.double(), benign.double()
    for name, matrix in (("malicious", malicious), ("benign", benign)):
        _check_symmetric(matrix, d, name)
    with _singular_explained():
        whitening = CholeskyWhitening(benign.clone(memory_format=torch.contiguous_format))
    moments = SecondMoments(MatrixScatter(malicious), 1, torch.zeros_like(malicious[0]))
    return solve_moments(moments, whitening, rank)


def solve_moments(malicious: SecondMoments, benign: Whitening, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `generalized_eigh`, of moments and a whitening as a `RunningCovariance` gives them.

    Beside what these hold there is no d x d matrix, unless the eigenvalues lie so close that `eigen.leading_pairs`
    falls back to a whole decomposition.

    Raises:
        ValueError: 1 <= k <= d does not hold.
    """
    if not 1 <= rank <= len(malicious.like):
        raise ValueError(f"rank={rank} must lie between 1 and d={len(malicious.like)}.")
    values, vectors = leading_pairs(malicious, benign, rank)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values, vectors * torch.sign(largest)


def _check_symmetric(matrix: torch.Tensor, d: int, name: str) -> None:
    problem = f"The {name} covariance of shape {tuple(matrix.shape)} must be a finite ({d}, {d}) matrix."
    if matrix.shape != (d, d):
        raise ValueError(problem)
    # A matrix that is not symmetric moves a random vector otherwise than its transpose does, which is quickly seen.
    probe = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype).to(matrix.device)
    moved = matrix @ probe
    if not torch.isfinite(moved).all():
        raise ValueError(problem)
    if (moved - probe @ matrix).abs().max() > SYMMETRY * moved.abs().max():
        raise ValueError(f"The {name} covariance is not symmetric.")


@contextmanager
def _singular_explained() -> Iterator[None]:
    try:
        yield
    except SingularError as error:
        raise ValueError(
            "The benign covariance is singular; raise the shrinkage, or give more benign prompts."
        ) from error


def orthonormalize(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of `vectors` (d, k), by QR with a positive diagonal; float64.

    Generalised eigenvectors are orthonormal in the metric of C_b, not in the plain one: ``I - U U^T`` of the raw
    vectors is no projector and changes with the unit of the activations.

    Raises:
        ValueError: the vectors are linearly dependent.
    """
    # Their lengths say nothing about the span, but would upset the test of dependence.
    vectors = vectors.double() / torch.linalg.vector_norm(vectors.double(), dim=0).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    q, r = torch.linalg.qr(vectors)
    diagonal = r.diagonal()
    if vectors.shape[1] > vectors.shape[0] or diagonal.abs().min() < 1e-10:
        raise ValueError(f"The {vectors.shape[1]} vectors are linearly dependent; lower the rank.")
    return q * torch.sign(diagonal)


def oblique_pair(moved: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis B and reader R, both (d, k), of the oblique projector ``I - B R^T = I - C U (U^T C U)^-1 U^T``.

    Args:
        moved: ``C U``, (d, k).
        vectors: U, (d, k).

    B spans ``C U`` and is orthonormal, ``R^T B = I``; for generalised eigenvectors ``U^T C U = I``, so this is
    ``I - C_b U U^T``: it removes what U reads and, in the sense of LEACE, changes benign activations as little as
    possible.

    Raises:
        ValueError: ``C U`` has linearly dependent columns.
    """
    vectors = vectors.double()
    basis = orthonormalize(moved)
    reader = torch.linalg.solve(vectors.mT @ basis, vectors.mT).mT
    return basis, reader
