"""`FakeQuantLinear`: a float layer that rounds as its quantized self will, and can be trained meanwhile.

    forward   y = Q(x) Q(W)ᵀ + b        Q(v) = s · round(clamp(v / s))
    backward  round is taken for the identity (straight through; Bengio et al. 2013), clamp for what it is

With a learned weight scale the same expression, differentiated by s, is LSQ (Esser et al. 2020, eq. 3): inside the
range ∂Q/∂s = round(v/s) - v/s, outside it is the clamped code; the gradient is scaled by 1/sqrt(n · steps) (section
2.2), n being how many weights share s.

    prepare(module, "w4a8")  →  train  →  convert(module)
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SchemeError
from ..formats.rounding import QuantizedTensor, choose_qparams, per_element, qparams_from_range, quantize
from ..formats.scheme import Scheme, TensorFormat, get_scheme
from .encoder_fast_path import leave_fast_paths
from .qlinear import QLinear

# How much of the range of a static activation the next batch replaces.
_RANGE_MOMENTUM = 0.1
_SLACK = 0.5 + 2**-10
_L = TypeVar("_L", bound=nn.Module)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """What x's codes stand for, float32, with the gradients that training needs.

    x: (*, in). scale, zero_point: `fmt.scale_shape(x.shape)`, float32. The values are exactly those of
    `dequantize(quantize(x, ...), ...)`, as in `fake_quantize_input`. Gradients reach x where it is not clipped, and
    `scale`.
    """
    step = per_element(scale, fmt, x.shape)
    zero = torch.zeros_like(step) if zero_point is None else per_element(zero_point, fmt, x.shape)
    low, high = (end - zero for end in fmt.code_range)
    # The extremes that chose the scale lie up to half a step outside: they are not clipped, and go on learning.
    codes = (x.float() / step).clamp(low - _SLACK, high + _SLACK)
    fixed = codes.detach()
    rounded = fixed.to(fmt.storage).float() if fmt.is_float else fixed.round()
    return (codes + (rounded.clamp(low, high) - fixed)) * step


class FakeQuantLinear(nn.Linear):
    """`torch.nn.Linear` that computes in the rounding of a scheme, and learns around it.

    Arguments, parameters and state are nn.Linear's; besides, scheme: a preset's name or a `Scheme`. learn_scale: the
    weight's scales are a parameter, `weight_scale`, trained by LSQ; otherwise they follow the weight's extremes.
    Static activations keep a running range of the inputs seen in training, `input_low` and `input_high` (1,).
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
        self.register_parameter("weight_scale", None)
        for name in ("input_low", "input_high"):
            seen_nothing = torch.full((1,), torch.nan, device=self.weight.device)
            self.register_buffer(name, seen_nothing if self.scheme.is_static else None)
        if learn_scale:
            self.weight_scale = nn.Parameter(_first_scale(self.weight.detach(), self.scheme.weight))

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: str | Scheme, *, learn_scale: bool = False) -> Self:
        """The layer with this one's own parameters: what trains the one trains the other."""
        weight = linear.weight
        made = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", weight.dtype,
            scheme=scheme, learn_scale=learn_scale,
        )  # fmt: skip
        made.weight, made.bias = linear.weight, linear.bias
        made._begin()
        return made.train(linear.training)

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
        return _gently(self.weight_scale, self.weight, self.scheme.weight), None

    def _round_input(self, x: Tensor, activation: TensorFormat) -> Tensor:
        if activation.dynamic:
            scale, zero_point = choose_qparams(x.detach(), activation)
        else:
            scale, zero_point = qparams_from_range(*self._input_range(x.detach()), activation)
        return fake_quantize(x, scale, zero_point, activation)

    def _input_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The running range of inputs, this batch counted in while training."""
        assert self.input_low is not None
        assert self.input_high is not None
        if self.training and x.numel():
            for end, now in ((self.input_low, x.amin()), (self.input_high, x.amax())):
                moved = end.float().lerp(now.float(), _RANGE_MOMENTUM)
                end.copy_(torch.where(end.isnan(), now.float(), moved))
        return self.input_low.float(), self.input_high.float()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Take nn.Linear's state as well: learned scales then begin at its weight's, and ranges have seen nothing."""
        missing: list[str] = rest[0]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
        own = [
            name for name in ("weight_scale", "input_low", "input_high") if getattr(self, name) is not None
        ]
        if f"{prefix}weight" not in state_dict or any(f"{prefix}{name}" in state_dict for name in own):
            return
        missing[:] = [name for name in missing if name.removeprefix(prefix) not in own]
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Start learned scales from the weight, and ranges from nothing, wherever the weight is by now."""
        if self.weight_scale is not None:
            scale = _first_scale(self.weight.detach(), self.scheme.weight)
            if self.weight_scale.device == scale.device:
                self.weight_scale.copy_(scale)
            else:
                self.weight_scale = nn.Parameter(scale)
        for name in ("input_low", "input_high"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.full((1,), torch.nan, device=self.weight.device))

    def convert(self) -> QLinear:
        """The quantized layer that computes what this one does. Raises SchemeError if a static layer saw no input."""
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
        """What `torch.nn.Linear` prints, and the scheme."""
        learned = "" if self.weight_scale is None else ", learn_scale=True"
        return f"{super().extra_repr()}, scheme={self.scheme.name}{learned}"


def _first_scale(weight: Tensor, fmt: TensorFormat) -> Tensor:
    """The scales that training starts from: those of round to nearest.

    LSQ starts a network that is trained from scratch at 2 mean|w| / sqrt(steps); for weights that are trained already
    that clips many, and the extremes are the better start.
    """
    if weight.is_meta:
        return torch.empty(fmt.scale_shape(weight.shape), device="meta")
    return choose_qparams(weight, fmt)[0]


def _gently(scale: Tensor, weight: Tensor, fmt: TensorFormat) -> Tensor:
    """`scale`, positive, with LSQ's factor 1 / sqrt(n · steps) on its gradient."""
    factor = (weight.numel() / scale.numel() * fmt.steps) ** -0.5
    slowed = scale.float() * factor
    faithful: Tensor = slowed + (scale - slowed).detach()
    return faithful.abs().clamp(min=torch.finfo(torch.float32).tiny)


def prepare(module: nn.Module, scheme: str | Scheme, *, learn_scale: bool = False) -> nn.Module:
    """Make every `nn.Linear` of a module trainable in the rounding of `scheme`, in place.

    The layers keep their parameters, so optimizers made before stay valid. Returns the module (a new one only where
    the module is itself an nn.Linear). Raises SchemeError, before anything changes, where the scheme does not fit.
    """
    scheme = get_scheme(scheme)
    for child in module.modules():
        if type(child) is nn.Linear:
            scheme.weight.scale_shape(child.weight.shape)

    def make(linear: nn.Linear) -> nn.Module:
        return FakeQuantLinear.from_float(linear, scheme, learn_scale=learn_scale)

    return _replaced(module, nn.Linear, make)


def convert(module: nn.Module) -> nn.Module:
    """Make every `FakeQuantLinear` of a module the `QLinear` that computes the same, in place; returns the module."""
    return _replaced(module, FakeQuantLinear, FakeQuantLinear.convert)


def _replaced(module: nn.Module, kind: type[_L], make: Callable[[_L], nn.Module]) -> nn.Module:
    """`module` with each child of exactly this kind made anew; one that stands in several places stays one."""
    if type(module) is kind:
        return make(module)
    made: dict[int, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and type(child) is kind:
                made[id(child)] = made.get(id(child)) or make(child)
                setattr(parent, name, made[id(child)])
    leave_fast_paths(module)
    return module
