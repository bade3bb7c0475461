"""The leading solutions of ``C_m u = lambda C_b u``, with few matrices in memory; float64.

The pencil is whitened, ``F F^T = C_b^-1`` and ``A = F^T C_m F``, and A is only ever applied to vectors.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

SINGULAR = 1e-7  # the smallest pivot of a factor against its largest
WHOLE = 512  # up to this size a whole decomposition takes no longer
TOLERANCE = 1e-8  # of ARPACK, relative to each eigenvalue; over the relative gap to the next, the error of the span
RESIDUAL = 1e-7  # what is let through, relative to the smallest eigenvalue wanted
ROUNDING = 1e-13  # relative to the largest eigenvalue: no decomposition leaves smaller residuals
MISSED = 1e-2  # how closely eigenvalues that were missed are looked for
RESTARTS = 60  # some 1,000 products; about then the whole decomposition is as fast


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

    Large problems are given to ARPACK (implicitly restarted Lanczos), started from a fixed vector; what it finds is
    checked. Small ones, and those on which it fails, are decomposed whole, for which some d x d matrices more are made.

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
    """The `rank` largest pairs of A by ARPACK, or None where it does not find them beyond doubt."""
    from scipy.sparse.linalg import ArpackError

    def whitened(x: np.ndarray) -> np.ndarray:
        columns = torch.from_numpy(x.reshape(d, -1)).to(moments.like)
        return whitening.back(moments.product(whitening.out(columns))).cpu().numpy().reshape(x.shape)

    def rest(x: np.ndarray) -> np.ndarray:
        return whitened(x) - vectors @ (values * (vectors.T @ x))

    d, generator = len(moments.like), np.random.default_rng(0)
    try:
        values, vectors = _arpack(whitened, rank, generator.standard_normal(d), TOLERANCE)
        # Lanczos may find one copy of an eigenvalue that there are several of; then one as large is left.
        missed, _ = _arpack(rest, 1, generator.standard_normal(d), MISSED, ncv=12)
    except ArpackError:  # no convergence, or a matrix of zeros
        return None
    residuals = np.linalg.norm(whitened(vectors) - vectors * values, axis=0)
    if residuals.max() > max(RESIDUAL * values[0], ROUNDING * values[-1]) or missed[0] > (1 + MISSED) * values[0]:
        return None
    pairs = (torch.from_numpy(found.copy()).to(moments.like) for found in (values[::-1], vectors[:, ::-1]))
    return tuple(pairs)


def _arpack(
    product: Callable, rank: int, start: np.ndarray, tolerance: float, ncv: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Values in increasing order, and vectors."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((len(start), len(start)), matvec=product, matmat=product, dtype=start.dtype)
    return eigsh(operator, rank, which="LA", v0=start, ncv=ncv, tol=tolerance, maxiter=RESTARTS)
