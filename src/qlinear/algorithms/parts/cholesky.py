"""The Cholesky factor of a group's hessian, computed once for all its weights and every use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.finite import require_finite

DAMPING = 0.01
# Rows and columns of a triangular or symmetric product that are computed at once.
PANEL = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """H + ridge = (I + U) D (I + U)ᵀ, with H the hessian (in, in) of a group.

    order: (in,) long, the columns from most to least important. upper: I + U (in, in), in that order. pivots: D (in,),
    in that order. damping: the ridge as a share of each channel's own diagonal element. ridge: (in,), in the channels'
    own order.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    damping: float
    ridge: Tensor

    def times(self, columns: Tensor, whitened: Tensor) -> Tensor:
        """H columns (in, n), at half the cost of the product.

        whitened: (I + U)ᵀ columns (in, n), in the factor's order; overwritten.
        """
        whitened.mul_(self.pivots.unsqueeze(1))
        product = columns * -self.ridge.unsqueeze(1)
        for start in range(0, len(whitened), PANEL):
            rows = self.upper[start : start + PANEL, start:]
            product[self.order[start : start + PANEL]] += rows @ whitened[start:]
        return product

    def solve(self, rows: Tensor) -> Tensor:
        """X (n, in) with X (H + ridge) = rows (n, in)."""
        half = torch.linalg.solve_triangular(
            self.upper.T, rows[:, self.order], upper=False, left=False, unitriangular=True
        )
        half.div_(self.pivots)
        ordered = torch.linalg.solve_triangular(self.upper, half, upper=True, left=False, unitriangular=True)
        solved = torch.empty_like(rows)
        solved[:, self.order] = ordered
        return solved


def factorize(hessian: Tensor, damping: float = DAMPING, name: str = "input") -> Factor | None:
    """Factorize a hessian (in, in) float32; None if even a damping of 1 does not make it positive definite.

    damping: the first to try; ten times as much after each failure. It is relative to each channel's own diagonal
    element, so that an outlier channel does not drown the others. A channel that was always 0 has no part in any other
    and gets a pivot of its own. name: of what reads the input. Raises NumericsError, with `name`, on NaN or infinity.
    """
    require_finite(hessian, f"the second moment of {name}")
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    size = power.sqrt().masked_fill(power <= 0, 1.0)[order]
    # Correlations are factorized, so that float32 is enough for channels of very different sizes. Cholesky's triangle
    # is the lower one; reversing rows and columns before and after gives the upper one.
    correlation = hessian[order.flip(0)][:, order.flip(0)]
    correlation.div_(size.flip(0)).div_(size.flip(0).unsqueeze(1))
    while damping <= 1:
        correlation.diagonal().copy_((power > 0)[order.flip(0)]).add_(damping)
        lower, failed = torch.linalg.cholesky_ex(correlation)
        if not failed:
            return _factor(lower.flip(0, 1), size, order, damping)
        damping *= 10
    return None


def _factor(upper: Tensor, size: Tensor, order: Tensor, damping: float) -> Factor:
    """The factor of the hessian, from the triangle of the correlations."""
    diagonal = upper.diagonal().clone()
    pivots = (diagonal * size).square()
    ridge = torch.empty_like(size)
    ridge[order] = size.square().mul_(damping)
    return Factor(order, upper.div_(diagonal * size).mul_(size.unsqueeze(1)), pivots, damping, ridge)
