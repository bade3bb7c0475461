"""The linear algebra of the method: tensors in, tensors out, float64 inside."""

from typing import Any

import torch

SYMMETRY = 1e-8  # relative asymmetry that still counts as rounding


class RunningCovariance:
    """Mean and covariance of a stream of vectors, in memory d x d however long the stream is.

    Chunks are merged about the running mean (Chan, Golub and LeVeque), so that a mean far from 0 costs no digits. What
    the Ledoit-Wolf shrinkage needs beyond that, a sum of fourth powers, is streamed about the first chunk's mean.

    Args:
        dimension: d.
        device: where the sums are kept until the first chunk; then where the chunks are.
    """

    def __init__(self, dimension: int, device: torch.device | str | None = None):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean = zeros(dimension)  # (d,)
        self.scatter = zeros(dimension, dimension)  # sum of (x - mean)(x - mean)^T
        self.origin = zeros(dimension)  # y = x - origin below
        self.fourth = zeros()  # sum of |y|^4
        self.third = zeros(dimension)  # sum of |y|^2 y

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
        mean = chunk.mean(dim=0)
        centred = chunk - mean
        self._add(len(chunk), mean, centred.mT @ centred)

    def to(self, device: torch.device | str) -> None:
        """Move the sums there."""
        for name in ("mean", "scatter", "origin", "fourth", "third"):
            setattr(self, name, getattr(self, name).to(device))

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def covariance(self, about: torch.Tensor | None = None) -> torch.Tensor:
        """Covariance (d, d), divided by n, about the own mean, or second moments about the vector `about` (d,).

        Raises:
            ValueError: nothing has been taken in.
        """
        self._check_not_empty()
        covariance = self.scatter / self.count
        if about is None:
            return covariance
        step = self.mean - about.to(self.mean)
        return covariance + torch.outer(step, step)

    def ledoit_wolf_shrinkage(self) -> float:
        """The share of the scaled identity that Ledoit and Wolf (2004) find best for the covariance about the own mean.

        Raises:
            ValueError: nothing has been taken in.
        """
        self._check_not_empty()
        n, d = self.count, len(self.mean)
        covariance = self.covariance()
        # Sum of |x - mean|^4 from sums about the origin: |y - m|^2 = |y|^2 - 2 m.y + |m|^2 with m = mean - origin.
        m = self.mean - self.origin
        second = self.scatter + n * torch.outer(m, m)  # sum of y y^T
        norm = m @ m
        fourth = self.fourth + 4 * m @ second @ m - 4 * m @ self.third + 2 * norm * second.trace() - 3 * n * norm**2
        mu = covariance.trace() / d
        delta = covariance.square().sum() / d - mu**2
        beta = (fourth / n - covariance.square().sum()) / (n * d)
        return float((beta.clamp(min=0) / delta).clamp(max=1)) if delta > 0 else 0.0

    def _check_not_empty(self) -> None:
        if self.count == 0:
            raise ValueError("No vectors were taken in, so there is no covariance.")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, as tensors."""
        names = ("mean", "scatter", "origin", "fourth", "third")
        return {"count": torch.tensor(self.count), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunningCovariance":
        """Take up where `state_dict` left off.

        Raises:
            KeyError: a tensor is missing.
        """
        running = cls(len(state["mean"]))
        running.count = int(state["count"])
        for name in ("mean", "scatter", "origin", "fourth", "third"):
            setattr(running, name, state[name].clone())
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
        if self.count == 0:
            self.__dict__.update(theirs.__dict__)
            return
        # Their sums of y = x - origin, taken about this origin: of y + s.
        n, s, m = theirs.count, theirs.origin - self.origin, theirs.mean - theirs.origin
        second = theirs.scatter + n * torch.outer(m, m)  # sum of y y^T
        norm, along, trace, moved = s @ s, s @ m, second.trace(), second @ s
        fourth = theirs.fourth + 4 * s @ moved + n * norm**2
        self.fourth = self.fourth + fourth + 4 * s @ theirs.third + 2 * norm * trace + 4 * n * norm * along
        self.third = self.third + theirs.third + 2 * moved + s * (trace + 2 * n * along + n * norm) + n * norm * m
        self._add(n, theirs.mean, theirs.scatter)


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
        if matrix.shape != (d, d) or not torch.isfinite(matrix).all():
            raise ValueError(
                f"The {name} covariance of shape {tuple(matrix.shape)} must be a finite ({d}, {d}) matrix."
            )
        if (matrix - matrix.mT).abs().max() > SYMMETRY * matrix.abs().max():
            raise ValueError(f"The {name} covariance is not symmetric.")
    factor, info = torch.linalg.cholesky_ex(benign)
    pivots = factor.diagonal()
    if info or pivots.min() <= 1e-7 * pivots.max():
        raise ValueError("The benign covariance is singular; raise the shrinkage, or give more benign prompts.")
    half = torch.linalg.solve_triangular(factor, malicious, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    vectors = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values, vectors * torch.sign(largest)


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


def oblique_pair(covariance: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis B and reader R, both (d, k), of the oblique projector ``I - B R^T = I - C U (U^T C U)^-1 U^T``.

    B spans ``C U`` and is orthonormal, ``R^T B = I``; for generalised eigenvectors ``U^T C U = I``, so this is
    ``I - C_b U U^T``: it removes what U reads and, in the sense of LEACE, changes benign activations as little as
    possible.

    Raises:
        ValueError: ``C U`` has linearly dependent columns.
    """
    vectors = vectors.double()
    basis = orthonormalize(covariance.double() @ vectors)
    reader = torch.linalg.solve(vectors.mT @ basis, vectors.mT).mT
    return basis, reader
