"""Coordinate descent: given codes and scales are moved one at a time to where the output error is least.

    loss = tr(E H Eᵀ),  E = W - Q,  gradient G = E H

Codes
    GPTQ rounds each column once, before it knows how the later ones come out. Here each column is rounded again with
    all others fixed. Along one column the loss is a parabola with its least at Q_j + G_j / H_jj, so the best grid value
    is the nearest one to that. This is the coordinate descent of QuantEase (Behdin et al. 2023).

Scales
    With the codes q of a group fixed, the loss is a parabola in the group's scale, least at s + (G_g qᵀ) / (q H_gg qᵀ).
    Moving the scales in the same sweep is new here. A scale moves only if the rounded one lowers the loss.

No step raises the loss, so the result is never worse than the start.

The order
    Columns are rows here, and are visited by halves (`column_grid.by_halves`). One product carries the changes of the
    left half to the gradient of the right half. In all sweeps but the last, the right half's changes are carried back
    to the left, for the next sweep. Within a block of one scale, Q_j + G_j / H_jj itself is carried instead of the
    gradient, in steps of the scale, so that a column only needs rounding.
"""

import torch
from torch import Tensor

from .cholesky import PANEL
from .column_grid import FEW, ColumnGrid, by_halves

# Columns of a block, unless a tile is smaller.
_BLOCK = 128


class Descent:
    """Codes and scales on their way down.

    targets: the weight (in, out) float32. steps: the current codes, in steps (in, out). grid: its scales are changed in
    place, as `steps` is. gradient: G there (in, out) float32; owned and changed by this object. hessian: H, the mean of
    x xᵀ (in, in) float32. Only scales of groups move; scales of
    rows, blocks and tensors stay.
    """

    def __init__(
        self,
        targets: Tensor,
        steps: Tensor,
        gradient: Tensor,
        grid: ColumnGrid,
        hessian: Tensor,
    ) -> None:
        self.steps, self._targets, self._gradient = steps, targets, gradient
        self._grid, self._hessian = grid, hessian
        self._has_groups = grid.format.granularity == "group"
        self._block = grid.width if grid.format.granularity in ("group", "block") else _BLOCK
        self._change = torch.empty_like(steps)
        curvature = hessian.diagonal()
        self._per_curvature = (
            torch.where(curvature > 0, 1 / curvature, 0.0).nan_to_num_(0.0, 0.0).unsqueeze(1)
        )
        # Buffers for one block: the best place of each column, in steps, and how far the column moves.
        self._best, self._moved = steps.new_empty(2, min(self._block, len(steps)), steps.shape[1])
        self._columns = [columns.unbind() for columns in (self._best, self._moved, self.steps)]

    def restart(self, rows: Tensor, grid: ColumnGrid, steps: Tensor) -> None:
        """Start the rows in the mask `rows` (out,) again from another grid, at its steps (in, out)."""
        self._grid.put_rows(rows, grid)
        self.steps.copy_(torch.where(rows, steps, self.steps))
        error = (self._targets - self._grid.values(self.steps))[:, rows]
        self._gradient[:, rows] = self._hessian @ error

    def run(self, sweeps: int) -> None:
        """Visit every column `sweeps` times."""
        for remaining in reversed(range(sweeps)):
            by_halves(0, len(self.steps), self._block, self._visit_block, self._carry, back=remaining > 0)

    def _carry(self, moved: slice, to: slice) -> None:
        self._gradient[to].addmm_(self._hessian[to, moved], self._change[moved], alpha=-1)

    def _visit_block(self, start: int, stop: int) -> None:
        part, count = slice(start, stop), stop - start
        steps, change, best = self.steps[part], self._change[part], self._best[:count]
        scale, within = self._grid.scales[start // self._grid.width], self._hessian[part, part]
        torch.mul(steps, scale, out=change).neg_()
        gradient = self._rescaled(part, scale, within) if self._has_groups else self._gradient[part]
        torch.div(gradient, scale, out=best).mul_(self._per_curvature[part]).add_(steps)
        self._round_block(start, count, within * self._per_curvature[part])
        change.addcmul_(steps.add_(self._moved[:count]), scale)
        self._gradient[part].addmm_(within, change, alpha=-1)

    def _rescaled(self, part: slice, scale: Tensor, within: Tensor) -> Tensor:
        """Move one group's scales to the least of their parabolas, rounded to their dtype.

        Returns the gradient after that, in the buffer `_best`.
        """
        steps, gradient = self.steps[part], self._gradient[part]
        bend, spare = self._best[: len(steps)], self._moved[: len(steps)]
        slope = torch.mul(gradient, steps, out=spare).sum(0)
        curvature = torch.mul(torch.mm(within, steps, out=bend), steps, out=spare).sum(0)
        best = scale + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        best = self._grid.storable(best.clamp(scale / 2, scale * 2))
        by = best - scale
        by.masked_fill_((by * curvature - 2 * slope) * by >= 0, 0.0)
        scale += by
        return torch.addcmul(gradient, bend, by, value=-1, out=bend)

    def _round_block(self, block: int, count: int, pull: Tensor) -> None:
        """Round a block's columns one by one.

        pull: (count, count), how far a move of one column by one step shifts the best place of another.
        """
        best, moved, steps = self._columns
        near = [pull.diagonal(-distance).tolist() for distance in range(FEW)]

        def visit(start: int, stop: int) -> None:
            for column in range(start, stop):
                for before in range(start, column):
                    best[column].add_(moved[before], alpha=-near[column - before][before])
                self._grid.round_(best[column], block)
                torch.sub(best[column], steps[block + column], out=moved[column])

        def carry(done: slice, to: slice) -> None:
            self._best[to].addmm_(pull[to, done], self._moved[done], alpha=-1)

        by_halves(0, count, FEW, visit, carry)


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """e H eᵀ (out,) for each row e of a weight's error, given as columns (in, out).

    H is symmetric, so each pair of panels is multiplied once.
    """
    total = torch.zeros_like(error[0])
    for start in range(0, len(error), PANEL):
        part = slice(start, min(start + PANEL, len(error)))
        into = torch.mm(hessian[part, :start], error[:start]).mul_(2)
        total += into.addmm_(hessian[part, part], error[part]).mul_(error[part]).sum(0)
    return total
