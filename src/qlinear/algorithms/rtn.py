"""Round to nearest: every weight goes to the closest code of its own row, group or tensor.

No data is needed. For int8 per channel it is all that is needed once the activations have been smoothed; it is
also what every other algorithm is measured against.
"""

import torch
from torch import Tensor

from ..formats.rounding import QuantizedTensor, quantize_tensor
from ..formats.scheme import Scheme


def round_to_nearest(
    weight: Tensor, scheme: Scheme, name: str = "weight", scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Codes of weight (out, in), any float dtype. Raises NumericsError, with `name`, on NaN or infinity.

    scale_dtype: what scales are rounded to before codes are chosen.
    """
    return quantize_tensor(weight, scheme.weight, name, scale_dtype)
