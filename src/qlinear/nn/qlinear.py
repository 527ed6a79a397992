"""`QLinear`: what stands where `torch.nn.Linear` stood.

The module holds codes and scales as buffers under the names that a checkpoint has, and its forward is one call.
Int8 weights with int8 activations go to the integer operators in `ops`; other weights with scales by rows or groups to
the one that dequantizes on the way into the product, or multiplies 4-bit codes as they are; any other scheme goes the
plain way, so a new format is right before it has a kernel. What a kernel derives from the codes (a packed layout) is no
part of the module's state: `ops` makes it again when the codes change.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import QLinearError, SchemeError
from ..formats.rounding import (
    QuantizedTensor,
    choose_qparams,
    dequantize,
    fake_quantize_input,
    qparams_from_range,
    quantize,
    quantize_tensor,
)
from ..formats.scheme import Scheme, TensorFormat, get_scheme

_OPTIONAL = ("weight_zero_point", "input_scale", "input_zero_point", "migration_scale")


class ChannelStats(Protocol):
    """What is known of a layer's input, per channel: float32 tensors of shape (in,)."""

    @property
    def min(self) -> Tensor:
        """The least value of each channel."""

    @property
    def max(self) -> Tensor:
        """The greatest value of each channel."""


def has_integer_kernel(scheme: Scheme) -> bool:
    """Whether the scheme's products are int8 codes times int8 codes with one scale per row of each."""
    weight, activation = scheme.weight, scheme.activation
    return (
        activation is not None
        and weight.storage == torch.int8
        and weight.symmetric
        and weight.granularity in ("channel", "tensor")
        and activation.dtype in ("int8", "uint8")
        and (activation.granularity == ("token" if activation.dynamic else "tensor"))
        and (activation.dtype == "int8" or not activation.dynamic)
    )


def has_weight_only_kernel(scheme: Scheme) -> bool:
    """Whether W has scales by rows or groups, and the input is float, or codes with one scale per token or in all."""
    weight, activation = scheme.weight, scheme.activation
    return weight.granularity in ("channel", "group") and (
        activation is None or activation.granularity == ("token" if activation.dynamic else "tensor")
    )


class QLinear(nn.Module):
    """A linear layer with quantized weights, y = x Wᵀ + b, called as `torch.nn.Linear` is.

    in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`; dtype is that of the bias. scheme: a
    preset's name or a `Scheme`.

    Buffers: `weight`, codes (out, in) in the format's storage dtype. `weight_scale`, float32 of the format's scale
    shape, (out, 1) per channel. `weight_zero_point`, the scale's shape, in the codes' dtype, or None. `input_scale`
    (1,) float32 and `input_zero_point` (1,) in the activation codes' dtype, for static activations, or None.
    `migration_scale` (in,) float32: the input is divided by it, or None. `bias` (out,) or None.

    The input is (*, in) in bfloat16, float16 or float32, and the output (*, out) in the same dtype; or it is a pair
    (codes (*, in) int8, scale (*, 1) float32) from a layer that has quantized already.
    """

    __constants__ = ("in_features", "out_features")
    in_features: int
    out_features: int
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    migration_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str | Scheme = "w8a8",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = get_scheme(scheme)
        self._dtype = dtype or torch.get_default_dtype()
        self._is_integer = has_integer_kernel(self.scheme)
        self._is_weight_only = not self._is_integer and has_weight_only_kernel(self.scheme)
        self._make_buffers(bias, torch.device(device) if device is not None else torch.get_default_device())
        self.reset_parameters()

    def _make_buffers(self, bias: bool, device: torch.device) -> None:
        weight, activation = self.scheme.weight, self.scheme.activation
        shape = (self.out_features, self.in_features)
        scales = weight.scale_shape(shape)
        self.register_buffer("weight", torch.zeros(shape, dtype=weight.storage, device=device))
        self.register_buffer("weight_scale", torch.ones(scales, device=device, dtype=torch.float32))
        bias_made = torch.zeros(self.out_features, dtype=self._dtype, device=device) if bias else None
        for name, buffer in (("bias", bias_made), *((name, None) for name in _OPTIONAL)):
            self.register_buffer(name, buffer)
        if not weight.symmetric:
            self.weight_zero_point = torch.zeros(scales, dtype=weight.storage, device=device)
        if activation is not None and not activation.dynamic:
            self.input_scale = torch.ones(1, dtype=torch.float32, device=device)
            if not activation.symmetric:
                self.input_zero_point = torch.zeros(1, dtype=activation.storage, device=device)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        buffers = self.__dict__.get("_buffers", {})
        if name in buffers:
            # torch.export finds a module's buffers by position, and counts those that are None: they stand last.
            for empty in [other for other, buffer in buffers.items() if buffer is None]:
                buffers[empty] = buffers.pop(empty)

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
        """The layer that holds these codes; nothing is rounded again.

        quantized: codes (out, in) in the scheme's weight format. bias: (out,) or None. migration_scale: (in,), what
        the input is to be divided by; the codes already hold W · diag(s). dtype: the bias's, by default as it is.
        Raises SchemeError where the codes' format is not the scheme's.
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
        """Take codes, bias and migration scale; static input scales, which nothing here tells, become 1."""
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

        stats: of the layer's input before the division by migration_scale; needed where activations are static.
        migration_scale: s (in,); the weight is multiplied by it, the input divided. Raises NumericsError on NaN or
        infinity, SchemeError where the scheme does not fit the shape or its activations are static without stats.
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
        """Choose the static input scale and zero point for inputs between two scalars (after migration)."""
        activation = self.scheme.activation
        if activation is None or activation.dynamic:
            raise SchemeError(f"scheme {self.scheme.name!r} has no static activations to give a range to")
        low, high = (end.detach().float().reshape(1).to(self.device) for end in (low, high))
        self.input_scale, zero_point = qparams_from_range(low, high, activation)
        self.input_zero_point = None if zero_point is None else zero_point.to(activation.storage)

    def reset_parameters(self) -> None:
        """Draw weights and bias as `torch.nn.Linear` does, U(±1/√in), and quantize them."""
        if self.weight.is_meta:
            return
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.device, torch.float32
        )
        quantized = quantize_tensor(linear.weight.detach(), self.scheme.weight)
        self.weight.copy_(quantized.codes)
        self.weight_scale.copy_(quantized.scale)
        if self.weight_zero_point is not None and quantized.zero_point is not None:
            self.weight_zero_point.copy_(quantized.zero_point)
        if self.bias is not None:
            self.bias.copy_(linear.bias.detach())

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype the layer was made for, or last moved to: that of its bias."""
        return self._dtype if self.bias is None else self.bias.dtype

    def dequantize(self) -> Tensor:
        """W (out, in), float32: what the codes stand for, the migration scale divided out again."""
        weight = self._migrated_weight()
        return weight if self.migration_scale is None else weight / self.migration_scale

    def _migrated_weight(self) -> Tensor:
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point, self.scheme.weight)

    def forward(self, input: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """input (*, in), or (codes (*, in), scale (*, 1)) → y (*, out).

        The gradient of the input is the float layer's, straight through the rounding; the layer itself has none.
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

    def _weight_only(self, x: Tensor, migration_scale: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = self.weight, self.weight_scale, self.weight_zero_point
        return ops.weight_only_linear(x, *weight, migration_scale, bias, self.scheme.weight.bits)

    def _forward_codes_weight_only(self, x: Tensor, activation: TensorFormat) -> Tensor:
        """The product with the input's codes as numbers; then their scale, and the bias."""
        migrated = x.float() if self.migration_scale is None else x.float() / self.migration_scale
        scale, zero_point = self.input_scale, self.input_zero_point
        if scale is None:
            scale, zero_point = choose_qparams(migrated, activation)
        codes = quantize(migrated, scale, zero_point, activation).float()
        if zero_point is not None:
            codes -= zero_point.float()
        # bfloat16 holds the difference of two bytes exactly, and torch's 4-bit product takes nothing else.
        half = x.dtype == torch.bfloat16 and self.scheme.weight.bits == 4
        y = self._weight_only(codes.bfloat16() if half else codes, None, None).float() * scale
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def _forward_integer(self, x: Tensor) -> Tensor:
        layer = (x, self.weight, self.weight_scale, self.migration_scale, self.bias)
        if self.input_scale is not None:
            return ops.static_linear(*layer, self.input_scale, self.input_zero_point)
        assert self.scheme.activation is not None
        return ops.dynamic_linear(*layer, self.scheme.activation.symmetric)

    def _forward_codes(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The layer on codes that are already quantized, and already divided by any migration scale."""
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
        """The layer on codes (*, in) in its own static input scale and zero point, as `requantized` gives them."""
        scale, zero_point = self._static_qparams()
        self._check_shape(codes)
        return ops.codes_linear(
            codes, scale, zero_point, self.weight, self.weight_scale, None, self.bias, self.dtype
        )

    def requantized(self, x: Tensor, consumer: "QLinear") -> Tensor:
        """The output as codes (*, out) for a layer that reads it: no float output in between.

        x: float (*, in). Both layers need static activations; raises SchemeError where they have none, or where the
        consumer divides its input by a migration scale, which codes of one scale cannot hold.
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
        """Dequantize and multiply: right for every scheme, and the only way for those without a kernel."""
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
            return  # a trace records tensors, and warns of every question that Python asks about them
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

    def extra_repr(self) -> str:
        """What `torch.nn.Linear` prints, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move everything, but change the dtype of the bias alone: codes and scales keep theirs."""
        keep = {id(buffer) for name, buffer in self.named_buffers(recurse=False) if name != "bias"}
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in keep or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Take optional buffers that the state holds, and refuse a weight that is not codes."""
        errors: list[str] = rest[-1]
        for name in _OPTIONAL:
            given = state_dict.get(prefix + name)
            if given is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(given, device=self.device))
        given = state_dict.get(prefix + "weight")
        if given is not None and given.dtype != self.weight.dtype:
            errors.append(
                f"{prefix}weight must hold {self.weight.dtype} codes; got {given.dtype}: quantize it first "
                "(QLinear.from_float)"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)


class _StraightThrough(torch.autograd.Function):
    """A layer's kernel forward, the float layer that it stands for backward."""

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
    """The least and greatest input after migration, over all channels."""
    if stats is None:
        raise SchemeError(
            f"scheme {scheme.name!r} has static activations: stats of the layer's input are needed to scale them"
        )
    low, high = stats.min.float(), stats.max.float()
    if migration_scale is not None:
        low, high = low / migration_scale, high / migration_scale
    return low.amin(), high.amax()
