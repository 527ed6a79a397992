"""`QLinear`: the quantized layer that replaces `torch.nn.Linear`.

The forward is one call of an operator in `ops`:

    int8 weights, int8 activations       the integer operators
    weights with scales per row or group `weight_only_linear`, which dequantizes in tiles or multiplies 4-bit codes
    any other scheme                     dequantize and multiply, so a new format is correct before it has a kernel

The buffers, and what moving and loading do to them, are in `linear_state`.
"""

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import QLinearError, SchemeError
from ..formats.rounding import (
    QuantizedTensor,
    choose_qparams,
    fake_quantize_input,
    input_qparams,
    quantize,
    quantize_tensor,
)
from ..formats.scheme import Scheme, TensorFormat, get_scheme
from .linear_state import QuantizedLinearState


class ChannelStats(Protocol):
    """Statistics of a layer's input per channel: float32 tensors of shape (in,)."""

    @property
    def min(self) -> Tensor:
        """The minimum of each channel."""

    @property
    def max(self) -> Tensor:
        """The maximum of each channel."""


class QLinear(QuantizedLinearState):
    """A linear layer with quantized weights, y = x Wᵀ + b, called as `torch.nn.Linear` is.

    in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`; dtype is that of the bias. scheme: a
    preset's name or a `Scheme`.

    Buffers: `weight`, codes (out, in) in the format's storage dtype. `weight_scale`, float32 of the format's scale
    shape, (out, 1) per channel. `weight_zero_point`, the scale's shape, in the codes' dtype, or None. `input_scale`
    (1,) float32 and `input_zero_point` (1,) in the activation codes' dtype, for static activations, or None; of NVFP4's
    inputs `input_scale` is the global scale, the divisor.
    `migration_scale` (in,) float32: the input is divided by it, or None. `bias` (out,) or None.

    The input is (*, in) in bfloat16, float16 or float32, and the output (*, out) in the same dtype; or it is a pair
    (codes (*, in) int8, scale (*, 1) float32) from a layer that has quantized already.
    """

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedTensor,
        bias: Tensor | None,
        scheme: str | Scheme,
        *,
        migration_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The layer that holds these codes, without rounding again.

        quantized: codes (out, in) in the scheme's weight format. bias: (out,) or None. migration_scale: s (in,), the
        divisor of the input; the codes already hold W · diag(s). dtype: of the bias, by default the one it has. Raises
        SchemeError if the codes have another format than the scheme.
        """
        scheme = get_scheme(scheme)
        if quantized.format != scheme.weight:
            raise SchemeError(
                f"scheme {scheme.name!r} takes weights as {scheme.weight}; the codes are {quantized.format}"
            )
        out_features, in_features = quantized.codes.shape
        dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        layer = cls(in_features, out_features, bias is not None, "meta", dtype, scheme=scheme)
        return layer._fill(quantized, bias, migration_scale)

    def _fill(self, quantized: QuantizedTensor, bias: Tensor | None, migration_scale: Tensor | None) -> Self:
        """Set codes, bias and migration scale; static input scales, which are unknown here, become 1."""
        device = quantized.codes.device
        self.to_empty(device=device)
        self.weight, self.weight_scale = quantized.codes, quantized.scale.float()
        if quantized.zero_point is not None:
            self.weight_zero_point = quantized.zero_point.to(self.scheme.weight.storage)
        if self.input_scale is not None:
            self.input_scale = torch.ones_like(self.input_scale)
        if self.input_zero_point is not None:
            self.input_zero_point = torch.zeros_like(self.input_zero_point)
        if migration_scale is not None:
            self.migration_scale = migration_scale.detach().to(device, torch.float32)
        self.bias = None if bias is None else bias.detach().to(device, self._dtype)
        return self

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: str | Scheme,
        stats: ChannelStats | None = None,
        migration_scale: Tensor | None = None,
    ) -> Self:
        """Round a float layer's weight to nearest.

        stats: of the layer's input before division by migration_scale; required for static activations.
        migration_scale: s (in,); the weight is multiplied by it, the input divided. Raises NumericsError on NaN or
        infinity, SchemeError if the scheme does not fit the shape or has static activations and stats is None.
        """
        scheme = get_scheme(scheme)
        weight = linear.weight.detach()
        if migration_scale is not None:
            weight = weight.float() * migration_scale
        bias = None if linear.bias is None else linear.bias.detach().clone()
        quantized = quantize_tensor(weight, scheme.weight)
        layer = cls.from_quantized(
            quantized, bias, scheme, migration_scale=migration_scale, dtype=linear.weight.dtype
        )
        if scheme.activation is not None and not scheme.activation.dynamic:
            layer.set_input_range(*_input_range(stats, migration_scale, scheme))
        return layer.train(linear.training)

    def set_input_range(self, low: Tensor, high: Tensor) -> None:
        """Set the static input scale and zero point for inputs, after migration, from `low` to `high` (scalars)."""
        activation = self.scheme.activation
        if activation is None or activation.dynamic:
            raise SchemeError(f"scheme {self.scheme.name!r} has no static activations to give a range to")
        low, high = (end.detach().float().reshape(1).to(self.device) for end in (low, high))
        self.input_scale, zero_point = input_qparams(low, high, activation)
        self.input_zero_point = None if zero_point is None else zero_point.to(activation.storage)

    def forward(self, input: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """input (*, in), or (codes (*, in), scale (*, 1)) → y (*, out).

        The input's gradient is that of the float layer (straight-through). The layer has no parameters.
        """
        if isinstance(input, tuple):
            return self._forward_codes(*input)
        self._check(input)
        if not (self._is_integer or self._is_weight_only):
            return self._forward_plain(input)
        if input.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(input, self)  # type: ignore[no-untyped-call,no-any-return]
        return self._forward_kernel(input)

    def _forward_kernel(self, x: Tensor) -> Tensor:
        if self._is_integer:
            return self._forward_integer(x)
        if self.scheme.activation is None:
            return self._weight_only(x, self.migration_scale, self.bias)
        return self._forward_codes_weight_only(x, self.scheme.activation)

    @property
    def _has_int4_weight(self) -> bool:
        return self.scheme.weight.dtype == "int4"

    def _weight_only(self, x: Tensor, migration_scale: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = self.weight, self.weight_scale, self.weight_zero_point
        return ops.weight_only_linear(x, *weight, migration_scale, bias, 4 if self._has_int4_weight else 8)

    def _forward_codes_weight_only(self, x: Tensor, activation: TensorFormat) -> Tensor:
        """Multiply the input's codes, as floats, with the weight; then apply their scale and the bias."""
        migrated = x.float() if self.migration_scale is None else x.float() / self.migration_scale
        scale, zero_point = self.input_scale, self.input_zero_point
        if scale is None:
            scale, zero_point = choose_qparams(migrated, activation)
        codes = quantize(migrated, scale, zero_point, activation).float()
        if zero_point is not None:
            codes -= zero_point.float()
        # bfloat16 holds the difference of two bytes exactly, and torch's 4-bit product takes no other dtype.
        half = x.dtype == torch.bfloat16 and self._has_int4_weight
        y = self._weight_only(codes.bfloat16() if half else codes, None, None).float() * scale
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _forward_integer(self, x: Tensor) -> Tensor:
        layer = (x, self.weight, self.weight_scale, self.migration_scale, self.bias)
        if self.input_scale is not None:
            return ops.static_linear(*layer, self.input_scale, self.input_zero_point)
        assert self.scheme.activation is not None
        return ops.dynamic_linear(*layer, self.scheme.activation.symmetric)

    def _forward_codes(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The layer on codes of an input that was already divided by the migration scale."""
        if not self._is_integer:
            raise SchemeError(
                f"scheme {self.scheme.name!r} takes no codes as input; give it the float tensor"
            )
        self._check_shape(codes)
        if codes.dtype != torch.int8 or scale.shape not in ((1,), (*codes.shape[:-1], 1)):
            raise QLinearError(
                f"a pair must be int8 codes (*, in) and their scale (*, 1) or (1,); got {codes.dtype} of shape "
                f"{tuple(codes.shape)} and a scale of shape {tuple(scale.shape)}"
            )
        return ops.codes_linear(
            codes, scale, None, self.weight, self.weight_scale, None, self.bias, self.dtype
        )

    def forward_static(self, codes: Tensor) -> Tensor:
        """The layer on codes (*, in) of its static input scale and zero point, as `requantized` returns them."""
        scale, zero_point = self._static_qparams()
        self._check_shape(codes)
        return ops.codes_linear(
            codes, scale, zero_point, self.weight, self.weight_scale, None, self.bias, self.dtype
        )

    def requantized(self, x: Tensor, consumer: "QLinear") -> Tensor:
        """The output as codes (*, out) in the static input scale of `consumer`, without a float output.

        x: float (*, in). Raises SchemeError unless both layers have static int8 activations, or if the consumer divides
        its input by a migration scale, which codes with one scale cannot represent.
        """
        self._check(x)
        scale, zero_point = self._static_qparams()
        out_scale, out_zero_point = consumer._static_qparams()
        if consumer.migration_scale is not None:
            raise SchemeError("the consumer divides its input by a migration scale: give it the float output")
        codes = ops.quantize_static(x, self.migration_scale, scale, zero_point)
        if out_zero_point is None:
            out_zero_point = torch.zeros(1, dtype=torch.int8, device=self.device)
        layer = (self.weight, self.weight_scale, None, self.bias)
        return ops.requantized_linear(codes, scale, zero_point, *layer, out_scale, out_zero_point)

    def _static_qparams(self) -> tuple[Tensor, Tensor | None]:
        if self.input_scale is None or not self._is_integer:
            raise SchemeError(
                f"scheme {self.scheme.name!r} has no static input scale: chains need static int8 layers"
            )
        return self.input_scale, self.input_zero_point

    def _forward_plain(self, x: Tensor) -> Tensor:
        """Dequantize and multiply: correct for every scheme, and used for schemes without a kernel."""
        activation = self.scheme.activation
        dtype = x.dtype if activation is None else torch.float32
        migrated = x if self.migration_scale is None else (x.float() / self.migration_scale)
        if activation is not None:
            migrated = self._round_input(migrated.float(), activation)
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor = F.linear(migrated.to(dtype), self._migrated_weight().to(dtype), bias)
        return y.to(x.dtype)

    def _round_input(self, x: Tensor, activation: TensorFormat) -> Tensor:
        rounded = fake_quantize_input(x.detach(), activation, self.input_scale, self.input_zero_point)
        return x + (rounded - x).detach() if x.requires_grad else rounded

    def _check(self, x: Tensor) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return  # torch.jit.trace warns of every Python condition on a tensor
        if not x.is_floating_point():
            raise QLinearError(
                f"input must be a floating point tensor; got {x.dtype} (codes go in as a pair with their scale)"
            )
        self._check_shape(x)

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise QLinearError(
                f"the input's last dimension must be in_features {self.in_features}; got shape {tuple(x.shape)}"
            )
        if x.device != self.weight.device:
            raise QLinearError(
                f"input and layer must be on one device; the input is on {x.device}, the layer on {self.device}"
            )


class _StraightThrough(torch.autograd.Function):
    """The layer's kernel in the forward pass, its float layer in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QLinear) -> Tensor:
        """y (*, out) of x (*, in)."""
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer._forward_kernel(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of x: that of y times W."""
        return (grad.float() @ ctx.layer.dequantize()).to(ctx.dtype), None


def _input_range(
    stats: ChannelStats | None, migration_scale: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """The minimum and maximum of the input after migration, over all channels."""
    if stats is None:
        raise SchemeError(
            f"scheme {scheme.name!r} has static activations: stats of the layer's input are needed to scale them"
        )
    low, high = stats.min.float(), stats.max.float()
    if migration_scale is not None:
        low, high = low / migration_scale, high / migration_scale
    return low.amin(), high.amax()
