"""The AWQ layout, GEMM version: 4-bit weights, float inputs. AutoAWQ and LMDeploy write it; vLLM reads it too.

Tensors of a linear [N, K] with groups of g:

    qweight  i32 [K, N/8]
    qzeros   i32 [K/g, N/8]
    scales   [K/g, N], in the model's dtype

Codes and zero points are stored plus 8, so 0 ... 15. A symmetric weight has zero points of 8.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SchemeError
from ...formats.packing import pack_awq, unpack_awq
from ...formats.rounding import QuantizedTensor
from ...formats.scheme import Scheme, TensorFormat
from ..reader import Checkpoint
from .base import QuantizedLinear, Schemes, as_scheme, is_excluded, only_scheme, require, without_patterns

QUANT_METHOD = "awq"
SCALE_NAME = "scales"
HOLDS_MIGRATION_SCALE = False
HOLDS_FLOAT_MIGRATION_SCALE = False
HOLDS_TRANSPOSED = False


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """See `Layout`. All linears share one scheme. group_size -1 means one group per row."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": _require_fit(only_scheme(schemes, "awq")).group_size or -1,
        # The file has zero points even for a symmetric weight: engines read them whatever this value is.
        "zero_point": True,
        "modules_to_not_convert": without_patterns(ignore),
    }


def schemes_from_config(config: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """See `Layout`."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(
            f"quantization_config has version {version!r} and {bits} bits: gemm with 4 can be read"
        )
    size = config.get("group_size", config.get("q_group_size", 128))
    weight = TensorFormat(
        "int4", "channel" if size == -1 else "group", None if size == -1 else size, symmetric=False
    )
    excluded = config.get("modules_to_not_convert") or []
    return {name: as_scheme(weight, None) for name in linears if not is_excluded(name, excluded)}


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, int] | None:
    """See `Layout`. Eight codes share a word along `out`."""
    info = checkpoint.tensors.get(f"{name}.qweight")
    return None if info is None else (info.shape[1] * 8, info.shape[0])


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """See `Layout`. Raises SchemeError where `out` is not a multiple of 8."""
    _require_fit(linear.scheme)
    weight = linear.weight
    if linear.migration_scale is not None:
        raise SchemeError(
            f"{name} keeps a migration scale, which the awq layout has no place for: --format qlinear"
        )
    if weight.codes.shape[0] % 8:
        raise SchemeError(
            f"{name} has {weight.codes.shape[0]} outputs; the awq layout needs a multiple of 8: --ignore it, or "
            "use --format compressed-tensors"
        )
    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return {
        f"{name}.qweight": pack_awq(weight.codes.T.contiguous()),
        f"{name}.qzeros": pack_awq(zero.to(torch.int8).T.contiguous()),
        f"{name}.scales": weight.scale.T.contiguous().to(linear.scale_dtype),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """See `Layout`."""
    codes = unpack_awq(require(name, "qweight", tensors)).T.contiguous()
    zero = unpack_awq(require(name, "qzeros", tensors)).T.contiguous().float()
    scales = require(name, "scales", tensors)
    weight = QuantizedTensor(codes, scales.T.contiguous().float(), zero, scheme.weight)
    return QuantizedLinear(scheme, weight, scales.dtype)


def _require_fit(scheme: Scheme) -> TensorFormat:
    """The scheme's weight format. Raises SchemeError unless the layout can hold it."""
    fmt = scheme.weight
    if fmt.dtype != "int4" or fmt.granularity not in ("group", "channel") or scheme.activation is not None:
        raise SchemeError(
            f"scheme {scheme.name} does not fit the awq layout, which holds 4-bit weights in groups with float "
            "inputs: use --format compressed-tensors"
        )
    return fmt
