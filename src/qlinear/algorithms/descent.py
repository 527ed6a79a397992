"""Coordinate descent: codes and scales that are given, moved one by one to where the output error is least.

    loss = tr(E H Eᵀ),  E = W - Q,  gradient G = E H

GPTQ rounds each column once, when it does not know yet how those after it will come out. Here each column is rounded
again with all others as they are: along one column the loss is a parabola, least at Q_j + G_j / H_jj, and of the values
on a grid the nearest to that is the best. Likewise the scale of a group: with its codes q fixed the loss is a parabola
in it, least at s + (G_g qᵀ) / (q H_gg qᵀ). No step raises the loss, so the result is never above what it began with.

Columns are rows here, and are taken by halves (`columns`): what the left half changed reaches the right half's gradient
in one product, and in all sweeps but the last the right half's change then reaches the left's, for the next.
"""

import torch
from torch import Tensor

from .columns import FEW, ColumnGrid, by_halves

# Columns that are descended along together where a group is no smaller.
_BLOCK = 128
# Rows and columns of a symmetric product that are computed at once.
_PANEL = 512


class Descent:
    """targets: the weight (in, out) float32. values: what its codes stand for, and grid: what they can stand for; both
    are moved in place. moment: H, the mean of x xᵀ (in, in) float32. scale_dtype: what scales are rounded to. Scales
    that serve whole rows, or several, stay as they are."""

    def __init__(
        self, targets: Tensor, values: Tensor, grid: ColumnGrid, moment: Tensor, scale_dtype: torch.dtype
    ) -> None:
        self.values, self._targets, self._grid, self._moment = values, targets, grid, moment
        self._scale_dtype, self._has_groups = scale_dtype, grid.format.granularity == "group"
        self._block = grid.width if self._has_groups else _BLOCK
        self._gradient = moment @ (targets - values)
        self._moved = torch.empty_like(values)
        self._before = values.new_empty(2, min(self._block, len(values)), values.shape[1])
        self._new = torch.empty_like(values[0])
        curvature = moment.diagonal()
        self._step = torch.where(curvature > 0, 1 / curvature, 0.0).nan_to_num_(0.0, 0.0).tolist()
        self._near = [moment.diagonal(distance).tolist() for distance in range(FEW)]
        self._columns = [each.unbind() for each in (self.values, self._gradient, self._moved)]

    def losses(self) -> Tensor:
        """The loss of each row (out,)."""
        return ((self._targets - self.values).mul_(self._gradient)).sum(0)

    def restart(self, rows: Tensor, grid: ColumnGrid, values: Tensor) -> None:
        """Begin some rows (out,) anew: on another grid, with its values (in, out)."""
        self._grid.put_rows(rows, grid)
        self.values.copy_(torch.where(rows, values, self.values))
        self._gradient[:, rows] = self._moment @ (self._targets - values)[:, rows]

    def run(self, sweeps: int) -> None:
        """Visit every column that many times."""
        for left in reversed(range(sweeps)):
            by_halves(0, len(self.values), self._block, self._visit_block, self._carry, back=left > 0)

    def _carry(self, moved: slice, to: slice) -> None:
        self._gradient[to].addmm_(self._moment[to, moved], self._moved[moved], alpha=-1)

    def _visit_block(self, start: int, stop: int) -> None:
        part = slice(start, stop)
        values, gradient = self._before[:, : stop - start]
        values.copy_(self.values[part])
        gradient.copy_(self._gradient[part])
        if self._has_groups:
            self._rescale(part)
        by_halves(start, stop, FEW, self._visit, self._carry)
        torch.sub(self.values[part], values, out=self._moved[part])
        torch.addmm(gradient, self._moment[part, part], self._moved[part], alpha=-1, out=self._gradient[part])

    def _rescale(self, part: slice) -> None:
        """Move one group's scales to the least of their parabolas, as far as their dtype holds it."""
        scale, within = self._grid.scales[part.start // self._block], self._moment[part, part]
        unit, spare = torch.div(self.values[part], scale), self._moved[part]
        slope = torch.mul(self._gradient[part], unit, out=spare).sum(0)
        curvature = torch.mm(within, unit, out=spare).mul_(unit).sum(0)
        best = scale + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        best = best.clamp(scale / 2, scale * 2).to(self._scale_dtype).float()
        step = best - scale
        step.masked_fill_((step * curvature - 2 * slope) * step >= 0, 0.0)
        scale += step
        self.values[part] += unit.mul_(step)
        self._gradient[part].addmm_(within, unit, alpha=-1)

    def _visit(self, start: int, stop: int) -> None:
        values, gradient, moved = self._columns
        for column in range(start, stop):
            for before in range(start, column):
                gradient[column].add_(moved[before], alpha=-self._near[column - before][before])
            new = torch.add(values[column], gradient[column], alpha=self._step[column], out=self._new)
            self._grid.round_(new, column)
            torch.sub(new, values[column], out=moved[column])
            values[column].copy_(new)


def row_losses(error: Tensor, moment: Tensor) -> Tensor:
    """e H eᵀ for each row e of a weight's error, given as columns (in, out): (out,). What is symmetric in H is computed
    once."""
    total = torch.zeros_like(error[0])
    for start in range(0, len(error), _PANEL):
        part = slice(start, min(start + _PANEL, len(error)))
        into = torch.mm(moment[part, :start], error[:start]).mul_(2)
        total += into.addmm_(moment[part, part], error[part]).mul_(error[part]).sum(0)
    return total
