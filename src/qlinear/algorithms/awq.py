"""AWQ: scale up the columns that matter, and clip the ranges that do not (Lin et al. 2023).

Scales (their eq. 4-5): s = a^α / w^(1-α), a the input's mean magnitude, w the mean relative magnitude of the column,
normalised by sqrt(max s · min s); α of 20 grid points with the least error of the group's real outputs. A large input
channel meets a finer grid in its column, at the cost of its neighbours' in the same group.

Clipping (section 3.2): the range of each row's group is narrowed to the share r with the least output error of that
group alone, e H_g eᵀ, e = w - Q_r(w), H_g the second moments of its input channels on the sample. What is gained group
by group can be lost between them, so a weight keeps its whole ranges where clipping is not better on all of its output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.rounding import QuantizedTensor, quantize, quantize_tensor
from .base import Group
from .parts.clipping import ENDS, least_error_qparams
from .parts.smoothing_search import OFF, Point, Search, scale_at, search

POINTS = tuple(Point(i / 20, "awq") for i in range(20))


def search_scale(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]] | None = None,
    points: Sequence[Point] = POINTS,
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """AWQ's alpha of least output error; s = 1, which leaves the group alone, unless some alpha is better.

    groups, scales_at, of_others: as for `search_alpha`. Weights are rounded with the ends of their ranges free to move
    by half a step, as `clip` will at least do. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    scales_at = scales_at or (lambda p: [scale_at(group, p) for group in groups])
    return search(groups, scales_at, points, OFF, ENDS, of_others)


@dataclass(frozen=True, slots=True)
class Clipped:
    """One weight's codes, and the squared error of its output on the sample; rtn_error is round to nearest's."""

    weight: QuantizedTensor
    error: float
    rtn_error: float


def clip(group: Group) -> Mapping[str, Clipped]:
    """Codes of each weight, its ranges clipped where that lowers the error of its output on the sample.

    group: as it will be quantized, smoothed already. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    hessians = _hessians(group)
    x = group.quantized_sample()
    return {name: _clip(name, weight, group, hessians, x) for name, weight in group.weights.items()}


def _clip(name: str, weight: Tensor, group: Group, hessians: Tensor, x: Tensor) -> Clipped:
    fmt = group.scheme.weight
    nearest = quantize_tensor(weight, fmt, name, group.scale_dtype)
    scale, zero_point = least_error_qparams(weight, fmt, hessians, group.scale_dtype)
    clipped = QuantizedTensor(quantize(weight, scale, zero_point, fmt), scale, zero_point, fmt)
    exact = group.sample @ weight.T
    rtn_error, error = (
        float((x @ each.dequantize().T).sub_(exact).square_().sum()) for each in (nearest, clipped)
    )
    return Clipped(clipped, error, rtn_error) if error < rtn_error else Clipped(nearest, rtn_error, rtn_error)


def _hessians(group: Group) -> Tensor:
    """Second moments of the sample: within each group of channels (groups, g, g), or of each channel alone (in,)."""
    size = group.scheme.weight.group_size
    if size is None:
        return group.sample.square().mean(0)
    tokens, columns = group.sample.shape
    parts = group.sample.reshape(tokens, columns // size, size).transpose(0, 1)
    return torch.bmm(parts.transpose(1, 2), parts) / max(1, tokens)
