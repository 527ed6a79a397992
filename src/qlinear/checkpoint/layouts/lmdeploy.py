"""LMDeploy's `smooth_quant` layout: W8A8 in int8 or fp8, one scale per output channel and one per token.

Tensors of a linear [N, K]:

    weight           i8 or e4m3 [N,K]
    scale            float32 [N,1]
    migration_scale  float32 [K], only where the smoothing is not folded: the runtime divides the input by it
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SchemeError
from ...formats.rounding import QuantizedTensor
from ...formats.scheme import Scheme, TensorFormat
from ..reader import Checkpoint
from .base import (
    QuantizedLinear,
    Schemes,
    as_scheme,
    is_excluded,
    only_scheme,
    plain_shape,
    require,
    without_patterns,
)

QUANT_METHOD = "smooth_quant"
SCALE_NAME = "scale"
HOLDS_MIGRATION_SCALE = True
HOLDS_FLOAT_MIGRATION_SCALE = False
HOLDS_TRANSPOSED = True


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """See `Layout`. All linears share one scheme."""
    dtype = _dtype(only_scheme(schemes, "lmdeploy"))
    return {
        "quant_method": "smooth_quant",
        "quant_dtype": dtype,
        "modules_to_not_convert": without_patterns(ignore),
    }


def schemes_from_config(config: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """See `Layout`."""
    dtype = config.get("quant_dtype") or "int8"
    if dtype not in ("int8", "float8_e4m3fn"):
        raise CheckpointError(
            f"quantization_config has quant_dtype {dtype!r}: int8 and float8_e4m3fn can be read"
        )
    excluded = config.get("modules_to_not_convert") or []
    return {name: _scheme(dtype) for name in linears if not is_excluded(name, excluded)}


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """See `Layout`."""
    return plain_shape(name, checkpoint)


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """See `Layout`."""
    _dtype(linear.scheme)
    tensors = {f"{name}.weight": linear.weight.codes, f"{name}.scale": linear.weight.scale.to(torch.float32)}
    if linear.migration_scale is not None:
        tensors[f"{name}.migration_scale"] = linear.migration_scale.to(torch.float32)
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """See `Layout`."""
    codes, scale = require(name, "weight", tensors), require(name, "scale", tensors)
    weight = QuantizedTensor(codes, scale.float().reshape(-1, 1), None, scheme.weight)
    return QuantizedLinear(scheme, weight, migration_scale=tensors.get(f"{name}.migration_scale"))


def _scheme(dtype: str) -> Scheme:
    kind: Any = dtype
    return as_scheme(TensorFormat(kind, "channel"), TensorFormat(kind, "token", dynamic=True))


def _dtype(scheme: Scheme) -> str:
    """The dtype of a scheme's codes. Raises SchemeError unless the layout can hold it."""
    for dtype in ("int8", "float8_e4m3fn"):
        supported = _scheme(dtype)
        if (scheme.weight, scheme.activation) == (supported.weight, supported.activation):
            return dtype
    raise SchemeError(
        f"scheme {scheme.name} does not fit the lmdeploy layout, which holds w8a8 and fp8 with dynamic "
        "symmetric tokens: use --format compressed-tensors"
    )
