"""A quantized checkpoint seen as the float one it was made from: what a model's parameters can be matched with.

Names, shapes and conversions of a float model then hold as they are. Linears take their codes from the file itself;
what is read through this view, the experts that a model stacks into one parameter, comes out dequantized.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats.scheme import Scheme
from ..runtime.device import Lift
from .layouts import layout_of
from .layouts.base import Layout, QuantizedLinear
from .layouts.qlinear import float_holders
from .reader import Checkpoint
from .safetensors_header import TensorInfo

# The tensors that hold a linear's codes and its scales, in one layout or another.
_CODES = ("weight", "weight_packed", "qweight")
_SCALES = ("weight_scale", "scale", "scales")


@dataclass(frozen=True)
class DequantizedView(Checkpoint):
    """A checkpoint in which each quantized matrix is a float32 tensor `<module>.weight`.

    stored: the checkpoint as it is. layout, schemes: how the quantized linears lie in it, by the file's module names.
    holders: the float linears that have a smoothing vector beside their weight.
    """

    stored: Checkpoint
    layout: Layout | None
    schemes: dict[str, Scheme]
    holders: frozenset[str] = frozenset()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "DequantizedView":
        """The view of a checkpoint, quantized or not. Raises CheckpointError for a quantization we cannot read."""
        config = quantization_config(checkpoint)
        if config is None:
            return cls(checkpoint.path, checkpoint.config, checkpoint.tensors, checkpoint, None, {})
        _, layout = layout_of(config)
        split = (key.rpartition(".") for key in checkpoint.tensors)
        modules = {module: nn.Linear(1, 1, device="meta") for module, _, leaf in split if leaf in _SCALES}
        schemes = layout.schemes_from_config(config, modules)
        dense = {f"{module}.weight": _dense_info(checkpoint, module) for module in schemes}
        tensors = dict(checkpoint.tensors) | dense
        holders = float_holders(config)
        return cls(checkpoint.path, checkpoint.config, tensors, checkpoint, layout, schemes, holders)

    def linear(self, module: str) -> QuantizedLinear:
        """What the file holds of a quantized linear. Raises CheckpointError if part of it is missing."""
        assert self.layout is not None
        own = {key: self.stored.read(key) for key in self.stored.tensors if key.startswith(f"{module}.")}
        return self.layout.unpack(module, own, self.schemes[module])

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor as `Checkpoint.read` gives it; a quantized matrix dequantized."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.schemes:
            return self.stored.read(name, out)
        weight = self.linear(module).weight.dequantize()
        return weight if out is None else out.copy_(weight)

    def read_as(self, name: str, out: Tensor) -> Tensor:
        """A tensor as `Checkpoint.read_as` gives it; a quantized matrix dequantized."""
        module, _, leaf = name.rpartition(".")
        is_quantized = leaf == "weight" and module in self.schemes
        return self.read(name, out) if is_quantized else self.stored.read_as(name, out)

    def read_to_device(self, name: str, out: Tensor, lift: Lift) -> Tensor:
        """A tensor as `Checkpoint.read_up` gives it; a quantized matrix dequantized."""
        module, _, leaf = name.rpartition(".")
        is_quantized = leaf == "weight" and module in self.schemes
        return self.read(name, out) if is_quantized else self.stored.read_to_device(name, out, lift)


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What config.json says of quantization, the text model's of a multimodal config included."""
    text: dict[str, Any] = checkpoint.config.get("text_config") or {}
    return checkpoint.config.get("quantization_config") or text.get("quantization_config")


def _dense_info(checkpoint: Checkpoint, module: str) -> TensorInfo:
    """Shape of a quantized matrix, and where its codes begin; its dtype is what `read` gives."""
    leaf = next((leaf for leaf in _CODES if f"{module}.{leaf}" in checkpoint.tensors), None)
    if leaf is None:
        raise CheckpointError(f"{module} has scales but no codes: download the checkpoint again")
    info = checkpoint.info(f"{module}.{leaf}")
    shape = info.shape
    if leaf == "qweight":  # AWQ: (in, out / 8)
        shape = (info.shape[1] * 8, info.shape[0])
    elif leaf == "weight_packed":
        shape = tuple(checkpoint.read(f"{module}.weight_shape").tolist())
    return replace(info, shape=shape, dtype_name="F32")
