"""Tensors that hold NaN or infinity: found in one pass, and named."""

import torch
from torch import Tensor

from ..errors import NumericsError

# Elements that stay in a core's cache.
_CHUNK = 1 << 17
# The bits of infinity, in the dtypes that torch sums slowly.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def count_bad(x: Tensor) -> int:
    """How many elements are NaN or infinite; one pass over x if none are."""
    if not x.is_floating_point() or x.numel() == 0 or _is_finite(x):
        return 0
    return int((~torch.isfinite(x)).sum())


def _is_finite(x: Tensor) -> bool:
    """Whether all elements are finite; may be False where large finite numbers sum to infinity."""
    infinity = _INFINITY.get(x.dtype)
    if infinity is None:
        return bool(torch.isfinite(x.sum(dtype=torch.float32)))
    # The bits of magnitudes sort as the magnitudes do, NaN above infinity. A sum is several times slower.
    parts = torch.split(x.view(torch.int16).reshape(-1), _CHUNK)
    return all(int((part & 0x7FFF).amax()) < infinity for part in parts)


def require_finite(x: Tensor, name: str, hint: str = "") -> None:
    """Raise NumericsError, naming the tensor and counting the elements, if `x` holds NaN or infinity."""
    bad = 0 if x.is_meta else count_bad(x)
    if bad:
        raise NumericsError(f"{name} holds {bad} NaN or infinite of {x.numel()} elements{hint}")
