"""Round to nearest: each weight takes the closest code of its own row, group or tensor.

It needs no data. For int8 per channel nothing more is needed once the activations are smoothed. All other algorithms
are measured against it.
"""

import torch
from torch import Tensor

from ..formats.rounding import QuantizedTensor, quantize_tensor
from ..formats.scheme import Scheme
from .base import Algorithm, Codes, Group


def round_to_nearest(
    weight: Tensor,
    scheme: Scheme,
    name: str = "weight",
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight to the nearest codes.

    weight: (out, in), any float dtype. name: of the weight, for errors. scale_dtype: the dtype that scales are rounded
    to before codes are chosen. global_scale: the divisor (1,) of stored scales, for formats that have one; the weight's
    own if None. Raises NumericsError, with `name`, on NaN or infinity.
    """
    return quantize_tensor(weight, scheme.weight, name, scale_dtype, global_scale)


class RoundToNearest(Algorithm):
    """`--algorithm rtn`."""

    name = "rtn"
    propagates = False
    searches_ranges = False

    def quantize(self, group: Group) -> dict[str, Codes]:
        """Codes of every weight. Raises NumericsError, naming the weight, on NaN or infinity."""
        shared = group.global_scale
        return {
            name: Codes(round_to_nearest(weight, group.scheme, name, group.scale_dtype, shared))
            for name, weight in group.weights.items()
        }
