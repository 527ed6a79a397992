"""A weight column by column, as GPTQ and its descent take it: columns are rows here, so that each lies in one piece.

Where a column has come to is told in steps, the weight over its scale: what is on the grid is a code less its zero
point, and to round is to round.

Work goes by halves: what was done to the left half of some columns is carried to the right half by one matrix
product, and so on inside each, until a few columns are left. All but the rounding is in large products then.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.rounding import QuantizedTensor, nearest_steps_
from ...formats.scheme import TensorFormat

# Columns that are taken one by one: to add one to another costs less than to call a product of so few.
FEW = 4


@dataclass(frozen=True, slots=True)
class ColumnGrid:
    """What each column of a weight (out, in) can be.

    format, scale, zero_point: of the weight, as in `QuantizedTensor`. scales, zeros: the same by tile of columns, for
    every row: (tiles, out). width: columns of a tile.
    """

    format: TensorFormat
    scale: Tensor
    zero_point: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    width: int

    @classmethod
    def of(cls, qparams: tuple[Tensor, Tensor | None], fmt: TensorFormat, shape: torch.Size) -> "ColumnGrid":
        """The grid with this scale and zero point for a weight of this shape."""
        scale, zero_point = qparams
        zeros = None if zero_point is None else _by_tile(zero_point, fmt, shape)
        return cls(fmt, scale, zero_point, _by_tile(scale, fmt, shape), zeros, fmt.tile(shape)[1])

    def round_(self, steps: Tensor, column: int) -> Tensor:
        """steps (out,), or (n, out) of n columns of one tile, in units of its scale: the nearest that codes stand for,
        in place."""
        zeros = None if self.zeros is None else self.zeros[column // self.width]
        return nearest_steps_(steps, zeros, self.format)

    def round_all_(self, columns: Tensor) -> Tensor:
        """All columns (in, out), each to the nearest steps of its grid, in place."""
        for start in range(0, len(columns), self.width):
            part = columns[start : start + self.width]
            self.round_(part.div_(self.scales[start // self.width]), start)
        return columns

    def values(self, steps: Tensor) -> Tensor:
        """What steps (in, out) stand for in the weight."""
        values = torch.empty_like(steps)
        for tile, scale in enumerate(self.scales):
            part = slice(tile * self.width, (tile + 1) * self.width)
            torch.mul(steps[part], scale, out=values[part])
        return values

    def put_rows(self, rows: Tensor, other: "ColumnGrid") -> None:
        """Take over the grid of another, where rows (out,) says so."""
        self.scales.copy_(torch.where(rows, other.scales, self.scales))
        if self.zeros is not None and other.zeros is not None:
            self.zeros.copy_(torch.where(rows, other.zeros, self.zeros))

    def quantized(self, steps: Tensor) -> QuantizedTensor:
        """The codes of steps (in, out) that are on the grid."""
        codes = torch.empty(steps.shape[::-1], dtype=self.format.storage, device=steps.device)
        for start in range(0, len(steps), self.width):
            part = slice(start, start + self.width)
            zeros = None if self.zeros is None else self.zeros[start // self.width]
            codes[:, part] = (steps[part] if zeros is None else steps[part] + zeros).T
        if self.format.granularity not in ("channel", "group"):
            return QuantizedTensor(codes, self.scale, self.zero_point, self.format)
        zero_point = None if self.zeros is None else self.zeros.T.contiguous()
        return QuantizedTensor(codes, self.scales.T.contiguous(), zero_point, self.format)


def _by_tile(per_tile: Tensor, fmt: TensorFormat, shape: torch.Size) -> Tensor:
    """A scale or zero point as (tiles, out)."""
    down = per_tile.reshape(1 if fmt.granularity == "tensor" else per_tile.shape[0], -1)
    return down.repeat_interleave(fmt.tile(shape)[0], 0)[: shape[0]].T.contiguous()


def by_halves(
    start: int,
    stop: int,
    few: int,
    visit: Callable[[int, int], None],
    carry: Callable[[slice, slice], None],
    back: bool = False,
) -> None:
    """Visit the columns from start to stop in runs of at most `few`; carry(from, to) takes a half to the next.

    back: whether the right half is carried to the left, too, once it is done.
    """
    if stop - start <= few:
        visit(start, stop)
        return
    middle = start + ((stop - start) // few + 1) // 2 * few
    left, right = slice(start, middle), slice(middle, stop)
    by_halves(start, middle, few, visit, carry, back)
    carry(left, right)
    by_halves(middle, stop, few, visit, carry, back)
    if back:
        carry(right, left)
