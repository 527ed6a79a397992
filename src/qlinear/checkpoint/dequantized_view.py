"""A quantized checkpoint under the names and shapes of the float checkpoint that it was made from.

So the name matching and the weight conversions of a float model apply unchanged. Quantized linears take their codes
with `DequantizedView.linear`. Other reads, such as experts that a model stacks into one parameter, are dequantized.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats.scheme import Scheme
from ..runtime.device import Uploader
from .layouts import layout_of
from .layouts.base import Layout, QuantizedLinear
from .layouts.qlinear import float_holders
from .reader import Checkpoint
from .safetensors_header import TensorInfo


@dataclass(frozen=True)
class DequantizedView(Checkpoint):
    """A checkpoint in which each quantized matrix is a float32 tensor `<module>.weight`.

    stored: the checkpoint as it is. layout: of its quantized linears; None for a float checkpoint. schemes: of the
    quantized linears, by the file's module names. holders: the float linears that have a `migration_scale`.
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
        # A tensor with the scales' name may belong to something else, such as a vision tower's norm.
        split = (key.rpartition(".") for key in checkpoint.tensors)
        infos = {m: _dense_info(checkpoint, m, layout) for m, _, leaf in split if leaf == layout.SCALE_NAME}
        linears: dict[str, nn.Module] = {
            module: nn.Linear(1, 1, device="meta") for module, info in infos.items() if info
        }
        schemes = _schemes(checkpoint, config, layout, linears)
        dense = {f"{module}.weight": info for module, info in infos.items() if info and module in schemes}
        tensors = dict(checkpoint.tensors) | dense
        holders = float_holders(config)
        return cls(checkpoint.path, checkpoint.config, tensors, checkpoint, layout, schemes, holders)

    def linear(self, module: str) -> QuantizedLinear:
        """A quantized linear, by the file's name of its module. Raises CheckpointError if part of it is missing."""
        assert self.layout is not None
        tensors = {key: self.stored.read(key) for key in self.stored.tensors if key.startswith(f"{module}.")}
        try:
            return self.layout.unpack(module, tensors, self.schemes[module])
        except (IndexError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{self.path} holds {module} in shapes or dtypes that {self.schemes[module].name} does not have "
                f"({' '.join(str(error).split())[:200]}): download it again"
            ) from None

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """`Checkpoint.read`; a quantized matrix is dequantized."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.schemes:
            return self.stored.read(name, out)
        weight = self.linear(module).weight.dequantize()
        return weight if out is None else out.copy_(weight)

    def read_as(self, name: str, out: Tensor) -> Tensor:
        """`Checkpoint.read_as`; a quantized matrix is dequantized."""
        module, _, leaf = name.rpartition(".")
        is_quantized = leaf == "weight" and module in self.schemes
        return self.read(name, out) if is_quantized else self.stored.read_as(name, out)

    def read_to_device(self, name: str, out: Tensor, uploader: Uploader) -> Tensor:
        """`Checkpoint.read_to_device`; a quantized matrix is dequantized."""
        module, _, leaf = name.rpartition(".")
        is_quantized = leaf == "weight" and module in self.schemes
        return self.read(name, out) if is_quantized else self.stored.read_to_device(name, out, uploader)


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The `quantization_config` of config.json, or of its `text_config`; None where there is none."""
    text = checkpoint.config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    config = checkpoint.config.get("quantization_config") or nested
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(
            f"{checkpoint.path} has a quantization_config that is no object: download it again"
        )
    return config


def _schemes(
    checkpoint: Checkpoint, config: dict[str, Any], layout: Layout, linears: dict[str, nn.Module]
) -> dict[str, Scheme]:
    """The schemes of quantized linears. Raises CheckpointError where the config is not built as it has to be."""
    try:
        return layout.schemes_from_config(config, linears)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(
            f"{checkpoint.path} has a quantization_config that cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): download it again"
        ) from None


def _dense_info(checkpoint: Checkpoint, module: str, layout: Layout) -> TensorInfo | None:
    """The dequantized matrix of a linear, float32, at the place of its scales; None where the file lacks its codes."""
    shape = layout.weight_shape(module, checkpoint)
    if shape is None or len(shape) != 2:
        return None
    return replace(checkpoint.info(f"{module}.{layout.SCALE_NAME}"), shape=shape, dtype_name="F32")
