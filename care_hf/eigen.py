"""The leading solutions of ``C_m u = lambda C_b u``, with few matrices in memory; float64.

The pencil is whitened, ``F F^T = C_b^-1`` and ``A = F^T C_m F``, and A is only ever applied to blocks of vectors.
"""

from typing import Protocol

import torch

SINGULAR = 1e-7  # the smallest pivot of a factor against its largest
WHOLE = 512  # up to this size a whole decomposition takes no longer
WIDER = 8  # by how much a block is wider than the rank: the gap that counts for speed is to the eigenvalue after it
STEPS = 40  # blocks at most; about then the whole decomposition is as fast
SELDOM = 12  # steps after which not each is followed by a look at what was found, which takes longer and longer
ANGLE = 1e-5  # between the span and the exact one, at most, by the bound of Davis and Kahan
TOLERANCE = 1e-8  # relative to the smallest eigenvalue wanted: suffices where the next is as good as equal to it
ROUNDING = 1e-13  # relative to the largest eigenvalue: no decomposition leaves smaller residuals


class SingularError(ValueError):
    """A matrix that should be positive definite is not."""


class Whitening(Protocol):
    """F (d, d) with ``F F^T = C^-1``, applied to columns (d, m)."""

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """``F x``: from whitened coordinates."""

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``F^T x``: into whitened coordinates."""


class Rows(Protocol):
    """X (n, d), in the products that are needed of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``X x``, (n, m), for x (d, m)."""

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """``X^T y``, (d, m), for y (n, m)."""

    def gram(self) -> torch.Tensor:
        """``X X^T``, (n, n)."""


class Moments(Protocol):
    """C (d, d), symmetric and positive semi-definite."""

    like: torch.Tensor  # (d,): dimension, dtype and device
    size: int  # how many eigenvalues may differ from 0: n < d where C has a `root` (d, n), else d

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``C x``, (d, m)."""

    def root(self) -> torch.Tensor:
        """X^T (d, n) with ``C = X^T X``, where n < d."""


class CholeskyWhitening:
    """``F = L^-T`` of ``C = L L^T``.

    Args:
        matrix: C, symmetric (d, d), contiguous; overwritten by the factor.

    Raises:
        SingularError: C is not positive definite.
    """

    def __init__(self, matrix: torch.Tensor):
        # LAPACK counts by columns: of the transposed view, torch makes no copy, here or in any solve.
        self.factor = matrix.mT
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(self.factor, out=(self.factor, info))
        pivots = self.factor.diagonal()
        if info or not pivots.min() > SINGULAR * pivots.max():
            raise SingularError(f"A matrix of shape {tuple(matrix.shape)} is singular.")

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """``L^-T x``, (d, m)."""
        return torch.linalg.solve_triangular(self.factor.mT, x, upper=True)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``L^-1 x``, (d, m)."""
        return torch.linalg.solve_triangular(self.factor, x, upper=False)


class RowsWhitening:
    """``F = (I - c X^T R^-T (I + R)^-1 X) / sqrt(ridge)`` of ``C = scale X^T X + ridge I``, in memory n x n beside X.

    Here ``c = scale / ridge``, and R is the lower Cholesky factor of ``I + c X X^T`` (Andrews, "A square root
    formulation of the Kalman covariance equations", 1968): that ``F F^T`` is the inverse by Woodbury's formula follows
    by multiplying out.

    Args:
        rows: X (n, d), n < d.
        scale, ridge: not negative.

    Raises:
        SingularError: the ridge is 0, or next to nothing beside ``X^T X``.
    """

    def __init__(self, rows: "Rows", scale: float, ridge: float):
        if not ridge > 0:
            raise SingularError("Fewer rows than dimensions are singular without a ridge; raise it.")
        self.rows, self.ridge, self.share = rows, ridge, scale / ridge
        gram = rows.gram().mul_(self.share)
        gram.diagonal().add_(1)
        self.root = CholeskyWhitening(gram)
        if not self.root.factor.diagonal().max() < 1 / SINGULAR:
            raise SingularError("The ridge is lost beside the rows; raise it.")

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """``F x``, (d, m)."""
        inner = self.root.out(self._solve_shifted(self.rows.forward(x), transposed=False))
        return (x - self.share * self.rows.adjoint(inner)) / self.ridge**0.5

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``F^T x``, (d, m)."""
        inner = self._solve_shifted(self.root.back(self.rows.forward(x)), transposed=True)
        return (x - self.share * self.rows.adjoint(inner)) / self.ridge**0.5

    def _solve_shifted(self, y: torch.Tensor, transposed: bool) -> torch.Tensor:
        """``(I + R)^-1 y``, or of the transposed; R itself is changed meanwhile, which saves a second n x n."""
        factor = self.root.factor
        diagonal = factor.diagonal().clone()
        factor.diagonal().add_(1)
        try:
            shifted = factor.mT if transposed else factor
            return torch.linalg.solve_triangular(shifted, y, upper=transposed)
        finally:
            factor.diagonal().copy_(diagonal)


def leading_pairs(moments: Moments, whitening: Whitening, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest solutions of ``C_m u = lambda C_b u``.

    Of large problems a block Krylov space is searched, begun with fixed random columns, until the span is within
    `ANGLE`. Small ones, and those on which that fails, are decomposed whole, for which some d x d matrices more are
    made.

    Args:
        moments: C_m.
        whitening: of C_b.
        rank: k, from 1 to d.

    Returns:
        Eigenvalues (k,), largest first, and vectors (d, k) with ``U^T C_b U = I``.
    """
    size = moments.size
    pairs = _krylov(moments, whitening, rank) if size > WHOLE and rank <= size // 8 else None
    if pairs is None:
        pairs = _thin(moments, whitening) if rank <= size < len(moments.like) else _whole(moments, whitening)
    values, vectors = pairs
    return values[:rank], whitening.out(vectors[:, :rank])


def _whole(moments: Moments, whitening: Whitening) -> tuple[torch.Tensor, torch.Tensor]:
    identity = torch.eye(len(moments.like), dtype=moments.like.dtype, device=moments.like.device)
    whitened = whitening.back(moments.product(whitening.out(identity)))
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    return values.flip(0), vectors.flip(1)


def _thin(moments: Moments, whitening: Whitening) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a d x d matrix, as ``A = (F^T X^T) (F^T X^T)^T``."""
    vectors, singular, _ = torch.linalg.svd(whitening.back(moments.root()), full_matrices=False)
    return singular.square(), vectors


def _krylov(moments: Moments, whitening: Whitening, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The `rank` largest pairs of A, or None where they are not found within `STEPS`.

    Block Lanczos with its whole basis kept and orthogonalised (Golub and Underwood, 1977), from a random block (Musco
    and Musco, 2015): a block reads the matrices once, as a vector would, and since it is wider than the rank, no copy
    of an eigenvalue of which there are several can be missed.
    """
    d, width = len(moments.like), rank + WIDER
    most = min(STEPS, moments.size // width)
    basis = moments.like.new_empty((most + 1) * width, d)
    projected = torch.zeros(most * width, most * width, dtype=torch.float64)  # Q^T A Q; small, so on the CPU
    start = torch.randn(d, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis[:width] = torch.linalg.qr(start.to(moments.like))[0].mT
    for step in range(1, most + 1):
        n = step * width
        last = basis[n - width : n].mT.contiguous()  # products with contiguous columns are far faster
        image = whitening.back(moments.product(whitening.out(last)))
        inside, outside, coupling = _split(image, basis[:n])
        basis[n : n + width] = outside.mT
        projected[:n, n - width : n] = inside
        if step % (1 + step // SELDOM) and step < most:
            continue
        pairs = _converged(projected[:n, :n], coupling.cpu(), rank)
        if pairs is not None:
            values, vectors = (found.to(moments.like) for found in pairs)
            return values, basis[:n].mT @ vectors
    return None


def _split(image: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``image = Q^T inside + outside coupling``, Q (n, d) and outside (d, b) orthonormal, and to each other."""
    inside = basis @ image
    outside, coupling = torch.linalg.qr(image - basis.mT @ inside)
    # Twice is enough. Only now, because columns that vanish become noise of length 1, which lies in the basis too.
    again = basis @ outside
    outside, second = torch.linalg.qr(outside - basis.mT @ again)
    return inside + again @ coupling, outside, second @ coupling


def _converged(projected: torch.Tensor, coupling: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The leading pairs of ``Q^T A Q``, largest first, if as pairs of A they leave small enough residuals."""
    # Not scipy's, for a few pairs: its threads go on spinning, and take the cores from torch's.
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(projected, UPLO="U"))
    residual = torch.linalg.matrix_norm(coupling @ vectors[-len(coupling) :, :rank])
    allowed = max(ANGLE * (values[rank - 1] - values[rank]), TOLERANCE * values[rank - 1], ROUNDING * values[0])
    return (values[:rank], vectors[:, :rank]) if residual <= allowed else None
