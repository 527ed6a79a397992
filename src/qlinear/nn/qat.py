"""`FakeQuantLinear`: a float layer whose forward rounds as the quantized layer does, for training.

    forward   y = Q(x) Q(W)ᵀ + b        Q(v) = s · round(clamp(v / s))
    backward  round counts as the identity (straight-through estimator; Bengio et al. 2013), clamp is differentiated

With a learned weight scale the same expression, differentiated by s, is LSQ (Esser et al. 2020, eq. 3): inside the
range ∂Q/∂s = round(v/s) - v/s, outside it is the clamped code. The gradient is scaled by 1/sqrt(n · steps) (section
2.2), where n is the number of weights that share s.

    prepare(module, "w4a8")  →  train  →  convert(module)
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SchemeError
from ..formats.rounding import (
    QuantizedTensor,
    choose_qparams,
    input_qparams,
    nearest_steps_,
    per_element,
    quantize,
)
from ..formats.scheme import Scheme, TensorFormat, get_scheme
from .encoder_fast_path import disable_fast_paths
from .qlinear import QLinear

# Weight of a new batch in the running range of a static activation.
_RANGE_MOMENTUM = 0.1
_SLACK = 0.5 + 2**-10
M = TypeVar("M", bound=nn.Module)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """The dequantized codes of x, float32, with straight-through gradients.

    x: (*, in). scale, zero_point: `fmt.scale_shape(x.shape)`, float32. The values equal
    `dequantize(quantize(x, ...), ...)` exactly, as in `fake_quantize_input`. Gradients flow to x where it is not
    clipped, and to `scale`.
    """
    step = per_element(scale, fmt, x.shape)
    zero = torch.zeros_like(step) if zero_point is None else per_element(zero_point, fmt, x.shape)
    low, high = (end - zero for end in fmt.code_range)
    # The extremes that determined the scale lie up to half a step outside. They are not clipped, so they keep learning.
    codes = (x.float() / step).clamp(low - _SLACK, high + _SLACK)
    fixed = codes.detach()
    rounded = nearest_steps_(fixed.clone(), None, fmt) if fmt.is_float else fixed.round()
    return (codes + (rounded.clamp(low, high) - fixed)) * step


class FakeQuantLinear(nn.Linear):
    """`torch.nn.Linear` that rounds weight and input as a scheme does, for quantization-aware training.

    Arguments, parameters and state are nn.Linear's. Further arguments: scheme, a preset's name or a `Scheme`;
    learn_scale, whether the weight's scales are a parameter `weight_scale`, trained by LSQ. Otherwise they follow the
    weight's extremes. Static activations keep a running range of training inputs, `input_low` and `input_high` (1,).
    """

    weight_scale: nn.Parameter | None
    input_low: Tensor | None
    input_high: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str | Scheme = "w8a8",
        learn_scale: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scheme = get_scheme(scheme)
        self.scheme.weight.scale_shape(self.weight.shape)  # raises where the scheme does not fit
        if learn_scale and not self.scheme.weight.symmetric:
            raise SchemeError(f"learned scales are symmetric; scheme {self.scheme.name!r} has zero points")
        if learn_scale and self.scheme.weight.scale_dtype is not None:
            raise SchemeError(
                f"learned scales are float32; scheme {self.scheme.name!r} stores {self.scheme.weight.scale_dtype}"
            )
        self.register_parameter("weight_scale", None)
        for name in ("input_low", "input_high"):
            empty_range = torch.full((1,), torch.nan, device=self.weight.device)
            self.register_buffer(name, empty_range if self.scheme.is_static else None)
        if learn_scale:
            self.weight_scale = nn.Parameter(_initial_scale(self.weight.detach(), self.scheme.weight))

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: str | Scheme, *, learn_scale: bool = False) -> Self:
        """The layer with the parameters of `linear`, shared: training one trains the other."""
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", weight.dtype,
            scheme=scheme, learn_scale=learn_scale,
        )  # fmt: skip
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._reset_learned_state()
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input (*, in) → (*, out), in the dtype that nn.Linear would give."""
        activation = self.scheme.activation
        rounded = input if activation is None else self._round_input(input, activation).to(input.dtype)
        scale, zero_point = self._weight_qparams()
        weight = fake_quantize(self.weight, scale, zero_point, self.scheme.weight)
        return F.linear(rounded, weight.to(self.weight.dtype), self.bias)

    def _weight_qparams(self) -> tuple[Tensor, Tensor | None]:
        if self.weight_scale is None:
            return choose_qparams(self.weight.detach(), self.scheme.weight)
        return _with_scaled_gradient(self.weight_scale, self.weight, self.scheme.weight), None

    def _round_input(self, x: Tensor, activation: TensorFormat) -> Tensor:
        if activation.dynamic:
            scale, zero_point = choose_qparams(x.detach(), activation)
        else:
            scale, zero_point = input_qparams(*self._input_range(x.detach()), activation)
            if activation.has_global_scale:
                scale, zero_point = choose_qparams(x.detach(), activation, global_scale=scale)
        return fake_quantize(x, scale, zero_point, activation)

    def _input_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The running range of inputs; training mode updates it with this batch."""
        assert self.input_low is not None
        assert self.input_high is not None
        if self.training and x.numel():
            for end, now in ((self.input_low, x.amin()), (self.input_high, x.amax())):
                updated = end.float().lerp(now.float(), _RANGE_MOMENTUM)
                end.copy_(torch.where(end.isnan(), now.float(), updated))
        return self.input_low.float(), self.input_high.float()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Load nn.Linear's state too: learned scales then start from its weight, and ranges are empty."""
        missing: list[str] = rest[0]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        extra = [
            name for name in ("weight_scale", "input_low", "input_high") if getattr(self, name) is not None
        ]
        if f"{prefix}weight" not in state_dict or any(f"{prefix}{name}" in state_dict for name in extra):
            return
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in extra]
        self._reset_learned_state()

    @torch.no_grad()
    def _reset_learned_state(self) -> None:
        """Set learned scales from the weight and empty the ranges, on the weight's device."""
        if self.weight_scale is not None:
            scale = _initial_scale(self.weight.detach(), self.scheme.weight)
            if self.weight_scale.device == scale.device:
                self.weight_scale.copy_(scale)
            else:
                self.weight_scale = nn.Parameter(scale)
        for name in ("input_low", "input_high"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.full((1,), torch.nan, device=self.weight.device))

    def convert(self) -> QLinear:
        """The `QLinear` that computes the same. Raises SchemeError if a static layer has no input range yet."""
        with torch.no_grad():
            scale, zero_point = self._weight_qparams()
        codes = quantize(self.weight.detach(), scale.detach(), zero_point, self.scheme.weight)
        quantized = QuantizedTensor(codes, scale.detach().clone(), zero_point, self.scheme.weight)
        bias = None if self.bias is None else self.bias.detach().clone()
        layer = QLinear.from_quantized(quantized, bias, self.scheme, dtype=self.weight.dtype)
        if self.input_low is not None and self.input_high is not None:
            if bool(self.input_low.isnan()):
                raise SchemeError(
                    "a static layer has no input range yet: run it on data in training mode first"
                )
            layer.set_input_range(self.input_low, self.input_high)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The text of `torch.nn.Linear`, and the scheme."""
        learned = "" if self.weight_scale is None else ", learn_scale=True"
        return f"{super().extra_repr()}, scheme={self.scheme.name}{learned}"


def _initial_scale(weight: Tensor, fmt: TensorFormat) -> Tensor:
    """The initial scales of training: those of rounding to nearest.

    LSQ starts from 2 mean|w| / sqrt(steps), for networks trained from scratch. That clips many weights of a trained
    network, where the extremes are the better start.
    """
    if weight.is_meta:
        return torch.empty(fmt.scale_shape(weight.shape), device="meta")
    return choose_qparams(weight, fmt)[0]


def _with_scaled_gradient(scale: Tensor, weight: Tensor, fmt: TensorFormat) -> Tensor:
    """`scale`, positive, with LSQ's factor 1 / sqrt(n · steps) on its gradient."""
    factor = (weight.numel() / scale.numel() * fmt.steps) ** -0.5
    scaled = scale.float() * factor
    result: Tensor = scaled + (scale - scaled).detach()
    return result.abs().clamp(min=torch.finfo(torch.float32).tiny)


def prepare(module: nn.Module, scheme: str | Scheme, *, learn_scale: bool = False) -> nn.Module:
    """Replace every `nn.Linear` of a module by a `FakeQuantLinear` of `scheme`, in place.

    The layers keep their parameters, so existing optimizers stay valid. Returns the module (a new one only if it is
    itself an nn.Linear). Raises SchemeError, before any change, where the scheme does not fit.
    """
    scheme = get_scheme(scheme)
    for child in module.modules():
        if type(child) is nn.Linear:
            scheme.weight.scale_shape(child.weight.shape)

    def make(linear: nn.Linear) -> nn.Module:
        return FakeQuantLinear.from_float(linear, scheme, learn_scale=learn_scale)

    return _replaced(module, nn.Linear, make)


def convert(module: nn.Module) -> nn.Module:
    """Replace every `FakeQuantLinear` of a module by an equal `QLinear`, in place; returns the module."""
    return _replaced(module, FakeQuantLinear, FakeQuantLinear.convert)


def _replaced(module: nn.Module, kind: type[M], make: Callable[[M], nn.Module]) -> nn.Module:
    """`module` with each child of exactly the type `kind` replaced; a child used in several places stays shared."""
    if type(module) is kind:
        return make(module)
    replacements: dict[int, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and type(child) is kind:
                replacements[id(child)] = replacements.get(id(child)) or make(child)
                setattr(parent, name, replacements[id(child)])
    disable_fast_paths(module)
    return module
