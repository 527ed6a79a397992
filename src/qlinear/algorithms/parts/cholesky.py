"""The factors of a group's second moments: made once, for all its weights and all that is done with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.rounding import require_finite

DAMPING = 0.01
# Rows and columns of a triangular or a symmetric product that are computed at once.
PANEL = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """H + ridge = (I + U) D (I + U)ᵀ, with H a group's second moments.

    order: (in,) long, the columns from most to least important. upper: U (in, in), with ones on the diagonal; pivots:
    D (in,), both in that order. damping: the ridge, as a share of each channel's own second moment; ridge:
    that (in,), in the channels' own order.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    damping: float
    ridge: Tensor

    def times(self, columns: Tensor, whitened: Tensor) -> Tensor:
        """H columns (in, n) at half the price, where whitened = (I + U)ᵀ columns (in, n) is known, in the factor's
        order, which is overwritten."""
        whitened.mul_(self.pivots.unsqueeze(1))
        product = columns * -self.ridge.unsqueeze(1)
        for start in range(0, len(whitened), PANEL):
            rows = self.upper[start : start + PANEL, start:]
            product[self.order[start : start + PANEL]] += rows @ whitened[start:]
        return product

    def solve(self, rows: Tensor) -> Tensor:
        """X (n, in) with X (H + ridge) = rows (n, in)."""
        left = torch.linalg.solve_triangular(
            self.upper.T, rows[:, self.order], upper=False, left=False, unitriangular=True
        )
        left.div_(self.pivots)
        right = torch.linalg.solve_triangular(self.upper, left, upper=True, left=False, unitriangular=True)
        solved = torch.empty_like(rows)
        solved[:, self.order] = right
        return solved


def factorize(hessian: Tensor, damping: float = DAMPING, name: str = "input") -> Factor | None:
    """Factorize second moments (in, in) float32; None if even a damping of 1 doesn't make them positive definite.

    damping: to begin with; ten times as much after each failure. It is relative to each channel's own second moment,
    so that an outlier channel does not drown the others. A channel that was always 0 is left alone: it has no part
    in any other. Raises NumericsError, with `name`, on NaN or infinity.
    """
    require_finite(hessian, f"the second moment of {name}")
    power = hessian.diagonal()
    order = power.argsort(descending=True, stable=True)
    size = power.sqrt().masked_fill(power <= 0, 1.0)[order]
    # Factorized as correlations, so that float32 is enough however far apart the channels' sizes are. Cholesky's
    # triangle is the lower one; reversing rows and columns before and after makes it the upper.
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
    """From the triangle of the correlations."""
    diagonal = upper.diagonal().clone()
    pivots = (diagonal * size).square()
    ridge = torch.empty_like(size)
    ridge[order] = size.square().mul_(damping)
    return Factor(order, upper.div_(diagonal * size).mul_(size.unsqueeze(1)), pivots, damping, ridge)
