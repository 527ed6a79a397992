"""AWQ: scale up the columns that matter, and clip the ranges that do not (Lin et al. 2023).

Scales (their eq. 4-5)
    s = a^α / w^(1-α), normalised by sqrt(max s · min s). a is the mean magnitude of the input channel, w the mean
    relative magnitude of the weight column. α is the one of 20 grid points with the least output error of the group.
    A large input channel then meets a finer grid in its column; the neighbours in the same quantization group pay.

Clipping (section 3.2)
    The range of each row's group is narrowed to the share r with the least output error of that group alone:
    e H_g eᵀ, e = w - Q_r(w), with H_g the hessian of the group's input channels on the sample. Errors of different
    groups can add up, so a weight keeps its full ranges unless clipping lowers the error of its whole output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.rounding import QuantizedTensor, quantize, quantize_tensor
from .base import Algorithm, Codes, Group
from .parts.clipping import ENDS, least_error_qparams
from .parts.smoothing_search import OFF, Point, Search, search

POINTS = tuple(Point(i / 20, "awq") for i in range(20))


def search_scale(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]],
    points: Sequence[Point] = POINTS,
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """AWQ's α of least output error; s = 1, which leaves the group unsmoothed, unless some α is better.

    groups, scales_at, of_others: as for `search_alpha`. Weights are rounded with ranges that may grow or shrink by half
    a step, the least that `clip` does later. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    return search(groups, scales_at, points, OFF, ENDS, of_others)


@dataclass(frozen=True, slots=True)
class Clipped:
    """The codes of one weight.

    error: the squared error of its output on the sample. rtn_error: that of round to nearest.
    """

    weight: QuantizedTensor
    error: float
    rtn_error: float


def clip(group: Group) -> Mapping[str, Clipped]:
    """Codes of each weight, with clipped ranges where that lowers the error of its output on the sample.

    group: smoothed already. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    hessians = _hessians(group)
    x = group.quantized_sample()
    return {name: _clip(name, weight, group, hessians, x) for name, weight in group.weights.items()}


class Awq(Algorithm):
    """`--algorithm awq`: clipping here; its scales are the default smoothing, `search_scale`."""

    name = "awq"
    needs = frozenset({"sample"})
    default_smooth = "awq"

    def quantize(self, group: Group) -> dict[str, Codes]:
        """Codes of every weight; see `clip`."""
        return {name: Codes(clipped.weight) for name, clipped in clip(group).items()}


def _clip(name: str, weight: Tensor, group: Group, hessians: Tensor, x: Tensor) -> Clipped:
    fmt = group.scheme.weight
    stored = group.scale_dtype, group.global_scale
    nearest = quantize_tensor(weight, fmt, name, *stored)
    scale, zero_point = least_error_qparams(weight, fmt, hessians, *stored)
    clipped = replace(
        nearest, codes=quantize(weight, scale, zero_point, fmt), scale=scale, zero_point=zero_point
    )
    exact = group.sample @ weight.T
    rtn_error, error = (
        float((x @ quantized.dequantize().T).sub_(exact).square_().sum()) for quantized in (nearest, clipped)
    )
    return Clipped(clipped, error, rtn_error) if error < rtn_error else Clipped(nearest, rtn_error, rtn_error)


def _hessians(group: Group) -> Tensor:
    """The mean of x xᵀ over the sample: of each group of channels (groups, g, g), or its diagonal (in,)."""
    size = group.scheme.weight.group_size
    if size is None:
        return group.sample.square().mean(0)
    tokens, columns = group.sample.shape
    parts = group.sample.reshape(tokens, columns // size, size).transpose(0, 1)
    return torch.bmm(parts.transpose(1, 2), parts) / max(1, tokens)
