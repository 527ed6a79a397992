"""The state of a quantized linear layer: its buffers, and what moving, loading and copying do to them.

The buffers have a checkpoint's names. Moving a layer to another dtype changes the bias alone; codes and scales keep
theirs. Values that a kernel derives from the codes, such as a packed layout, are no state: `ops` caches them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..formats.rounding import dequantize, quantize_tensor
from ..formats.scheme import Scheme, get_scheme

_OPTIONAL = ("weight_zero_point", "input_scale", "input_zero_point", "migration_scale")


def has_integer_kernel(scheme: Scheme) -> bool:
    """Whether the scheme multiplies int8 codes by int8 codes, with one scale per row of each."""
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
    """Whether W has scales per row or group, and the input is float or has one scale per token or tensor."""
    weight, activation = scheme.weight, scheme.activation
    return weight.granularity in ("channel", "group") and (
        activation is None or activation.granularity == ("token" if activation.dynamic else "tensor")
    )


class QuantizedLinearState(nn.Module):
    """The buffers of a `QLinear`, which documents them, and their handling as a module's state."""

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
        bias_buffer = torch.zeros(self.out_features, dtype=self._dtype, device=device) if bias else None
        for name, buffer in (("bias", bias_buffer), *((name, None) for name in _OPTIONAL)):
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
            # torch.export identifies buffers by position and counts the ones that are None, so these go last.
            for empty in [other for other, buffer in buffers.items() if buffer is None]:
                buffers[empty] = buffers.pop(empty)

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn.Linear` does, from U(±1/√in), and quantize the weight."""
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
        """The device of the codes."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype that the layer was made for or last moved to; the bias has it."""
        return self._dtype if self.bias is None else self.bias.dtype

    def dequantize(self) -> Tensor:
        """W (out, in), float32: the dequantized codes divided by the migration scale."""
        weight = self._migrated_weight()
        return weight if self.migration_scale is None else weight / self.migration_scale

    def _migrated_weight(self) -> Tensor:
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point, self.scheme.weight)

    def extra_repr(self) -> str:
        """The text of `torch.nn.Linear`, and the scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move every buffer, but change the dtype of the bias alone: codes and scales keep theirs."""
        keep = {id(buffer) for name, buffer in self.named_buffers(recurse=False) if name != "bias"}
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype

        def move(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) not in keep or converted.dtype == tensor.dtype:
                return converted
            return tensor.to(converted.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Create the optional buffers that the state holds, and reject a weight that is not codes."""
        errors: list[str] = rest[-1]
        for name in _OPTIONAL:
            loaded = state_dict.get(prefix + name)
            if loaded is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(loaded, device=self.device))
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None and loaded.dtype != self.weight.dtype:
            errors.append(
                f"{prefix}weight must hold {self.weight.dtype} codes; got {loaded.dtype}: quantize it first "
                "(QLinear.from_float)"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
