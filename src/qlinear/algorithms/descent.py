"""Coordinate descent: codes and scales that are given, moved one by one to where the output error is least.

    loss = tr(E H Eᵀ),  E = W - Q,  gradient G = E H

GPTQ rounds each column once, when it does not know yet how those after it will come out. Here each column is rounded
again with all others as they are: along one column the loss is a parabola, least at Q_j + G_j / H_jj, and of the values
on a grid the nearest to that is the best. Likewise the scale of a group: with its codes q fixed the loss is a parabola
in it, least at s + (G_g qᵀ) / (q H_gg qᵀ). No step raises the loss, so the result is never above what it began with.

Columns are taken in order, by halves as in GPTQ: what the left half changed reaches the right half's gradient in one
matrix product. Here columns are rows, so that one is contiguous.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..numerics import QuantizedTensor, dequantize, quantize
from ..scheme import TensorFormat
from .tiles import by_tile_column

# Columns that are descended along together where a group is no smaller.
_BLOCK = 128


def descend(
    weight: Tensor,
    start: QuantizedTensor,
    moment: Tensor,
    sweeps: int = 2,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """Codes and group scales of no larger loss than `start` has.

    weight: (out, in) float32. moment: H, the mean of x xᵀ (in, in) float32. sweeps: how often every column is visited.
    scale_dtype: what scales are rounded to. Scales that serve whole rows, or several, stay as they are.
    """
    state = _State.of(weight, start, moment, scale_dtype)
    for _ in range(sweeps):
        state.sweep(weight.T)
    return state.result()


@dataclass(slots=True)
class _State:
    """Codes, what they stand for and the loss's gradient, all (in, out); scales and zeros (tiles, out)."""

    start: QuantizedTensor
    moment: Tensor
    scale_dtype: torch.dtype
    codes: Tensor
    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    gradient: Tensor
    moved: Tensor

    @classmethod
    def of(cls, weight: Tensor, start: QuantizedTensor, moment: Tensor, scale_dtype: torch.dtype) -> "_State":
        fmt, shape = start.format, weight.shape
        zeros = None if start.zero_point is None else by_tile_column(start.zero_point, fmt, shape)
        values = start.dequantize().T.contiguous()
        return cls(
            start, moment, scale_dtype, start.codes.T.contiguous(), values,
            by_tile_column(start.scale, fmt, shape), zeros, torch.empty_like(values), torch.empty_like(values),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.start.format.tile(self.start.codes.shape)[1]

    @property
    def has_groups(self) -> bool:
        """Whether a scale serves a part of one row alone."""
        return self.start.format.granularity == "group"

    def sweep(self, targets: Tensor) -> None:
        """Visit every column once. targets: the weight (in, out)."""
        torch.mm(self.moment, targets - self.values, out=self.gradient)
        self.moved.zero_()
        self._blocks(0, len(self.values))

    def _blocks(self, start: int, stop: int) -> None:
        block = self.width if self.has_groups else _BLOCK
        if stop - start <= block:
            if self.has_groups:
                self._rescale(start, stop)
            self._columns(start, stop)
            return
        middle = start + (stop - start + block) // (2 * block) * block
        self._blocks(start, middle)
        self.gradient[middle:stop].addmm_(
            self.moment[middle:stop, start:middle], self.moved[start:middle], alpha=-1
        )
        self._blocks(middle, stop)

    def _rescale(self, start: int, stop: int) -> None:
        """Move one group's scales to the least of their parabolas, as far as their dtype holds it."""
        part, tile, within = slice(start, stop), start // self.width, self.moment[start:stop, start:stop]
        scale = self.scales[tile]
        unit = self.values[part] / scale
        slope, curvature = (self.gradient[part] * unit).sum(0), (unit * (within @ unit)).sum(0)
        best = scale + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        best = best.clamp(scale / 2, scale * 2).to(self.scale_dtype).float()
        step = best - scale
        step.masked_fill_((step * curvature - 2 * slope) * step >= 0, 0.0)
        change = step * unit
        self.scales[tile] = scale + step
        self.values[part] += change
        self.moved[part] += change
        self.gradient[part] -= within @ change

    def _columns(self, start: int, stop: int) -> None:
        if stop - start > 1:
            middle = (start + stop) // 2
            before = self.values[start:middle].clone()
            self._columns(start, middle)
            change = self.values[start:middle] - before
            self.gradient[middle:stop].addmm_(self.moment[middle:stop, start:middle], change, alpha=-1)
            self._columns(middle, stop)
            return
        curvature = self.moment[start, start]
        if curvature > 0:
            self._round(start, self.values[start] + self.gradient[start] / curvature)

    def _round(self, column: int, target: Tensor) -> None:
        tile = column // self.width
        grid = self.scales[tile], None if self.zeros is None else self.zeros[tile]
        one_each = TensorFormat(self.start.format.dtype, "token", symmetric=self.start.format.symmetric)
        code = quantize(target, *grid, one_each)
        value = dequantize(code, *grid, one_each)
        self.codes[column] = code
        self.moved[column] += value - self.values[column]
        self.values[column] = value

    def result(self) -> QuantizedTensor:
        """As it is by now."""
        scale = self.scales.T.contiguous() if self.has_groups else self.start.scale
        return replace(self.start, codes=self.codes.T.contiguous(), scale=scale)
