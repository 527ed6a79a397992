"""Choosing the range of a static activation from a sample of inputs; inputs outside the range are clamped.

A static scale is chosen before the inputs are known. A range that covers every calibration input keeps the largest
values but gives the many small ones coarse steps. Clamping a few rare values gives finer steps to all others.
`input_range` takes a sample of a layer's input, after migration, and returns the ends of the range.
`QLinear.set_input_range` converts these to a scale and a zero point.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import QLinearError
from ..formats.finite import require_finite
from ..formats.rounding import fake_quantize_input, qparams_from_range
from ..formats.scheme import TensorFormat

RangeMethod = Literal["minmax", "percentile", "least_squares"]
_SHRINK_STEPS = 100


def input_range(
    sample: Tensor, fmt: TensorFormat, method: RangeMethod = "minmax", percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of the range, two float32 scalars.

    sample: inputs of any shape. fmt: the per-tensor activation format. method: "minmax", the whole sample;
    "percentile", all but the `100 - percentile` percent farthest from zero, counted at each end for a format with a
    zero point; "least_squares", the range with the smallest squared error over the sample, clamping included.
    Raises NumericsError on NaN or infinity, QLinearError on an empty sample or an unknown method.
    """
    require_finite(sample, "the sample of a layer's input")
    if sample.numel() == 0:
        raise QLinearError("a range needs a sample of inputs; got an empty one")
    values = sample.detach().float().flatten()
    if method == "minmax":
        return values.amin(), values.amax()
    if method == "percentile":
        return _percentile(values, fmt, percentile)
    if method == "least_squares":
        return _least_squares(values, fmt)
    raise QLinearError(f"method must be 'minmax', 'percentile' or 'least_squares'; got {method!r}")


def _percentile(values: Tensor, fmt: TensorFormat, percentile: float) -> tuple[Tensor, Tensor]:
    if not 50 < percentile <= 100:
        raise QLinearError(f"percentile must lie in (50, 100]; got {percentile}")
    if fmt.symmetric:
        end = _quantile(values.abs(), percentile / 100)
        return -end, end
    return -_quantile(-values, percentile / 100), _quantile(values, percentile / 100)


def _quantile(values: Tensor, fraction: float) -> Tensor:
    """The smallest value that at least `fraction` of the values do not exceed. `torch.quantile` limits their number."""
    count = max(1, -int(-fraction * values.numel() // 1))
    return values.kthvalue(min(count, values.numel())).values


def _least_squares(values: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """The best of 100 ranges: the full one, shrunk towards zero in equal steps."""
    low, high = values.amin(), values.amax()
    shrunk = [1 - step / _SHRINK_STEPS for step in range(_SHRINK_STEPS)]
    errors = [_squared_error(values, low * ratio, high * ratio, fmt) for ratio in shrunk]
    best = shrunk[int(torch.stack(errors).argmin())]
    return low * best, high * best


def _squared_error(values: Tensor, low: Tensor, high: Tensor, fmt: TensorFormat) -> Tensor:
    rounded = fake_quantize_input(values, fmt, *qparams_from_range(low.view(1), high.view(1), fmt))
    return (rounded - values).square_().sum(dtype=torch.float64)
