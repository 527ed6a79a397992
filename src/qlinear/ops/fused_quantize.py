"""Operators that end in per-token quantization: a norm, a gated product, or the quantization alone.

Each returns int8 codes and a scale per token, so that no float tensor of the input's size is written and read again. On
CPUs they run over as many rows as stay in cache. The factor 1/rms of an RMS norm is one number per token, so it is
multiplied into the scale instead of the values.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.rounding import quantize
from ..formats.scales import scale_from_absmax
from .cpu_int8 import blocks_in_cache, round_to_int32
from .reference import TOKEN_INT8, migrate

# Rows of the inputs → float32 values to round, and a factor for their scale (or None).
_Values = Callable[..., tuple[Tensor, Tensor | None]]


def _quantized(values: _Values, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (*, n) and float32 scale (*, 1) of `values(*inputs)`, inputs (*, n)."""
    first = inputs[0]
    codes = torch.empty_like(first, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = first.new_empty(*first.shape[:-1], 1, dtype=torch.float32)
    for *rows, row_codes, row_scale in blocks_in_cache(*inputs, codes, scale):
        y, factor = values(*rows)
        step = scale_from_absmax(y.abs().amax(-1, keepdim=True), TOKEN_INT8)
        if y.is_cpu:
            row_codes.copy_(round_to_int32(y.div_(step), 0))
        else:
            row_codes.copy_(quantize(y, step, None, TOKEN_INT8))
        row_scale.copy_(step if factor is None else step.mul_(factor))
    return codes, scale


def quantize_tokens(x: Tensor, migration_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of x / migration_scale."""
    return _quantized(lambda rows: (_without_alias(migrate(rows, migration_scale), rows), None), x)


def _without_alias(values: Tensor, source: Tensor) -> Tensor:
    """`values`, copied if they are the caller's tensor `source`, which must not be overwritten."""
    return values.clone() if values is source else values


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, migration_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of x / sqrt(mean(x²) + eps) * weight / migration_scale, over the last dimension."""
    gain = migrate(weight, migration_scale)

    def values(rows: Tensor) -> tuple[Tensor, Tensor]:
        y = rows.float()
        return y * gain, y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()

    return _quantized(values, x)


def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, migration_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of layer_norm(x) * weight + bias, all / migration_scale, over the last dimension."""
    gain = migrate(weight, migration_scale)
    shift = None if bias is None else migrate(bias, migration_scale)
    return _quantized(lambda rows: (F.layer_norm(rows.float(), gain.shape, gain, shift, eps), None), x)


def silu_mul_quantize(gate: Tensor, up: Tensor, migration_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of silu(gate) * up / migration_scale: the input of a gated feed-forward block's last layer."""

    def values(gates: Tensor, ups: Tensor) -> tuple[Tensor, None]:
        y = F.silu(gates.float()).mul_(ups)
        return y if migration_scale is None else y.div_(migration_scale), None

    return _quantized(values, gate, up)
