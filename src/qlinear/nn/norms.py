"""Norms that return int8 codes, for the quantized layers that read them.

A norm and the per-token quantization of its output are one operator, so the normalized tensor is never written to
memory. `QLinear` takes the returned pair (codes, scale) in place of a float tensor.
"""

from typing import Self

import torch
from torch import Tensor, nn

from .. import ops


class _QuantizingNorm(nn.Module):
    """The state of both norms: weight (n,), and migration_scale (n,) float32 or None, which divides the output."""

    weight: Tensor
    migration_scale: Tensor | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))
        self.register_buffer("migration_scale", None)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{self.normalized_shape}, eps={self.eps}"


class QRMSNorm(_QuantizingNorm):
    """RMS norm and per-token quantization: x (*, n) → codes (*, n) int8, scale (*, 1) float32.

    They represent x / sqrt(mean(x²) + eps) * (offset + weight) / migration_scale (Zhang and Sennrich 2019).
    offset: 1 for norms that store their gain minus one. All arithmetic is in float32.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, device, dtype)
        self.offset = offset

    @classmethod
    def from_float(
        cls, norm: nn.RMSNorm, migration_scale: Tensor | None = None, *, offset: float = 0.0
    ) -> Self:
        """The norm with this weight and eps; migration_scale (n,) is that of the layers that read it."""
        quantized = cls(
            norm.weight.shape[0], _eps(norm), norm.weight.device, norm.weight.dtype, offset=offset
        )
        quantized.weight, quantized.migration_scale = norm.weight, migration_scale
        return quantized

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, n) → (codes, scale)."""
        gain = self.weight.detach().float()
        return ops.rms_norm_quantize(
            x, gain + self.offset if self.offset else gain, self.eps, self.migration_scale
        )


def _eps(norm: nn.RMSNorm) -> float:
    """The epsilon, under either name that RMS norms use; torch's None means the dtype's machine epsilon."""
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(torch.finfo(norm.weight.dtype).eps) if eps is None else eps


class QLayerNorm(_QuantizingNorm):
    """Layer norm and per-token quantization: x (*, n) → codes (*, n) int8, scale (*, 1) float32.

    They represent ((x - mean) / sqrt(var + eps) * weight + bias) / migration_scale (Ba et al. 2016).
    """

    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, device, dtype)
        quantized = nn.Parameter(torch.zeros(normalized_shape, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", quantized)

    @classmethod
    def from_float(cls, norm: nn.LayerNorm, migration_scale: Tensor | None = None) -> Self:
        """The norm with this weight, bias and eps; migration_scale (n,) is that of the layers that read it."""
        weight = norm.weight
        quantized = cls(weight.shape[0], norm.eps, norm.bias is not None, weight.device, weight.dtype)
        quantized.weight, quantized.bias, quantized.migration_scale = weight, norm.bias, migration_scale
        return quantized

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, n) → (codes, scale)."""
        bias = None if self.bias is None else self.bias.detach()
        return ops.layer_norm_quantize(x, self.weight.detach(), bias, self.eps, self.migration_scale)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, migration_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up / migration_scale, with gate and up (*, n), as codes (*, n) int8 and scale (*, 1) float32."""
    return ops.silu_mul_quantize(gate, up, migration_scale)
