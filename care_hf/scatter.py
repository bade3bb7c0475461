"""Sums of squares of vectors about their mean: as rows while these are few, as a d x d matrix when they are many."""

from dataclasses import dataclass

import torch

from .eigen import CholeskyWhitening, RowsWhitening, Whitening


class RowScatter:
    """``S = X^T X`` of rows X (n, d) less their mean, in memory n x d.

    Args:
        rows: (n, d), float64, near their mean: they are kept as they are, and it is taken off products.
    """

    def __init__(self, rows: torch.Tensor):
        self.rows, self.mean = rows, rows.mean(dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``X x``, (n, m), for x (d, m)."""
        return self.rows @ x - self.mean @ x

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """``X^T y``, (d, m), for y (n, m)."""
        return self.rows.mT @ y - torch.outer(self.mean, y.sum(dim=0))

    def gram(self) -> torch.Tensor:
        """``X X^T``, (n, n)."""
        gram = self.rows @ self.rows.mT
        gram -= gram.mean(dim=0)
        gram -= gram.mean(dim=1, keepdim=True)
        return gram

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``S x``, (d, m)."""
        return self.adjoint(self.forward(x))

    def trace(self) -> torch.Tensor:
        """``tr S``, ()."""
        return (self.rows.square().sum(dim=1).sum() - len(self.rows) * self.mean.square().sum()).clamp(min=0)

    def norm(self) -> torch.Tensor:
        """The Frobenius norm of S, ()."""
        return torch.linalg.matrix_norm(self.gram())

    def matrix(self) -> torch.Tensor:
        """S, (d, d)."""
        centred = self.rows - self.mean
        return centred.mT @ centred

    def whitening(self, scale: float, ridge: float) -> Whitening:
        """Of ``scale S + ridge I``.

        Raises:
            SingularError: the ridge is 0, or lost beside S.
        """
        return RowsWhitening(self, scale, ridge)


class MatrixScatter:
    """``S``, symmetric (d, d), float64."""

    def __init__(self, matrix: torch.Tensor):
        self._matrix = matrix

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``S x``, (d, m)."""
        return (x.mT @ self._matrix).mT.contiguous()  # of few columns, BLAS is faster from the left

    def trace(self) -> torch.Tensor:
        """``tr S``, ()."""
        return self._matrix.trace()

    def norm(self) -> torch.Tensor:
        """The Frobenius norm of S, ()."""
        return torch.linalg.vector_norm(self._matrix)

    def matrix(self) -> torch.Tensor:
        """S itself, (d, d)."""
        return self._matrix

    def whitening(self, scale: float, ridge: float) -> Whitening:
        """Of ``scale S + ridge I``; one more d x d matrix is made.

        Raises:
            SingularError: it is not positive definite.
        """
        matrix = self._matrix * scale
        matrix.diagonal().add_(ridge)
        return CholeskyWhitening(matrix)


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """``C = S / n + step step^T`` of n vectors, about the point that lies `step` (d,) short of their mean."""

    scatter: RowScatter | MatrixScatter
    count: int
    step: torch.Tensor

    @property
    def like(self) -> torch.Tensor:
        """A vector (d,) of the same kind."""
        return self.step

    @property
    def size(self) -> int:
        """n where C is of n < d rows, else d."""
        return min(self.count, len(self.step)) if isinstance(self.scatter, RowScatter) else len(self.step)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``C x``, (d, m)."""
        return self.scatter.product(x) / self.count + torch.outer(self.step, self.step @ x)

    def root(self) -> torch.Tensor:
        """X^T (d, n) with ``C = X^T X``, of rows.

        Raises:
            TypeError: the scatter is a matrix.
        """
        if not isinstance(self.scatter, RowScatter):
            raise TypeError("Only rows have a root that is no d x d matrix.")
        return (self.scatter.rows - (self.scatter.mean - self.step)).mT / self.count**0.5
