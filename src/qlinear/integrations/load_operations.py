"""The two operations with which transformers' loader makes a model's tensors of a quantized file's.

The loader collects the tensors that belong to one parameter, calls `convert` with them, and sets what it returns. A
tensor that is no part of a quantized linear passes through, in the dtype of its parameter.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from ..checkpoint.layouts.base import QuantizedLinear
from ..checkpoint.layouts.qlinear import unpack
from ..formats.scheme import Scheme
from .find_layers import Layers


@dataclass(frozen=True, slots=True)
class StoredScale:
    """What the file says of a weight's scales and a `QLinear` does not keep: their dtype there, and the global scale
    that they were divided by, (1,), or None."""

    dtype: torch.dtype
    global_scale: Tensor | None


class Quantizer(Protocol):
    """What the operations know of the quantizer. stored_scales: by the model's module names, filled in here."""

    layers: Layers | None
    stored_scales: dict[str, StoredScale]


class _Operation(ConversionOps):
    """hf_quantizer: the loader knows by this name that dtypes are this operation's business."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The loader copies an operation for every parameter. All copies belong to the one quantizer.
        return type(self)(self.hf_quantizer)


class UnpackLinear(_Operation):
    """The buffers of a `QLinear` from what the file holds of one linear."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """input_dict: tensors by the last part of their names. Returns them by the model's full names."""
        module, tensors = full_layer_name.rpartition(".")[0], {k: _one(v) for k, v in input_dict.items()}
        layers = self.hf_quantizer.layers
        assert layers is not None
        if module in layers.schemes:
            named = {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
            linear = unpack(module, named, layers.schemes[module])
            stored = StoredScale(tensors["weight_scale"].dtype, linear.weight.global_scale)
            self.hf_quantizer.stored_scales[module] = stored
            return {f"{module}.{leaf}": tensor for leaf, tensor in _buffers(linear).items()}
        state = model.get_submodule(module)
        return {f"{module}.{leaf}": tensor.to(getattr(state, leaf).dtype) for leaf, tensor in tensors.items()}


class DequantizeExperts(_Operation):
    """Floats from the codes of matrices that the model stacks or splits, before it does so."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """input_dict: by the pattern of their names, lists with a tensor for each expert. Returns those of weights."""
        layers = self.hf_quantizer.layers
        assert layers is not None
        scheme, dtype = layers.stacks.get(full_layer_name), model.get_parameter(full_layer_name).dtype
        weights: dict[str, Any] = {}
        for pattern in [key for key in input_dict if key.endswith((".weight", ".weight_packed"))]:
            stem = pattern.rpartition(".")[0]
            members = {key: input_dict.pop(key) for key in list(input_dict) if key.rpartition(".")[0] == stem}
            weights[f"{stem}.weight"] = _stack(stem, members, scheme, dtype)
        return weights


def _stack(stem: str, members: dict[str, Any], scheme: Scheme | None, dtype: torch.dtype) -> list[Tensor]:
    """The matrices of one projection of all experts; each takes the place of its codes in memory."""
    count = max(len(tensors) for tensors in members.values() if isinstance(tensors, list))
    matrices = []
    for _ in range(count):
        tensors = {key: tensors.pop(0) for key, tensors in members.items()}
        if scheme is None or f"{stem}.weight_scale" not in tensors:
            matrices.append(tensors[f"{stem}.weight"].to(dtype))
        else:
            matrices.append(unpack(stem, tensors, scheme).weight.dequantize().to(dtype))
    return matrices


def _one(tensors: Any) -> Tensor:
    tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
    return tensor


def _buffers(linear: QuantizedLinear) -> dict[str, Tensor]:
    """What a `QLinear` holds of a quantized linear, by its buffers' names, without those that it has not."""
    weight, activation = linear.weight, linear.scheme.activation
    buffers = {
        "weight": weight.codes,
        "weight_scale": weight.scale.float(),
        "weight_zero_point": weight.zero_point,
        "input_scale": linear.input_scale,
        "input_zero_point": linear.input_zero_point,
        "migration_scale": linear.migration_scale,
    }
    present = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    if "weight_zero_point" in present:
        present["weight_zero_point"] = present["weight_zero_point"].to(linear.scheme.weight.storage)
    if "input_zero_point" in present and activation is not None:
        present["input_zero_point"] = present["input_zero_point"].to(activation.storage)
    return present
