"""Which modules of a transformers model a quantized file holds codes of, by the model's own names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint.dequantized_view import DequantizedView
from ..checkpoint.reader import Checkpoint
from ..formats.scheme import Scheme
from ..streaming.meta_model import keep_in_float32
from ..streaming.streamed_model import replace_transposed
from ..streaming.weight_map import WeightMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Layers:
    """schemes: of the linears that are quantized. migrated: those of them that have a migration scale. holders: the
    float linears that have one. stacks: the schemes of parameters that are made of several quantized matrices, such as
    all experts of a layer."""

    schemes: dict[str, Scheme]
    migrated: frozenset[str]
    holders: tuple[str, ...]
    stacks: dict[str, Scheme]


def find_layers(model: "PreTrainedModel", checkpoint: Checkpoint) -> Layers:
    """Match a model on meta with a quantized file. Linears that store (in, out) become `nn.Linear`s, as in the file.

    Raises CheckpointError where the file does not fit the model.
    """
    with torch.device("cpu"):  # transformers builds models while the default device is meta
        view = DequantizedView.of(checkpoint)
        replace_transposed(model, view.schemes)
        keep_in_float32(model, model.dtype)
        _tie(model)
        names = WeightMap(model, view)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stored = {name: names.source_module(name) for name in linears if names.is_one_tensor(name)}
    schemes = {name: view.schemes[module] for name, module in stored.items() if module in view.schemes}
    migrated = {name for name in schemes if f"{stored[name]}.migration_scale" in checkpoint.tensors}
    holders = tuple(name for name, module in stored.items() if module in view.holders)
    return Layers(schemes, frozenset(migrated), holders, _stacks(model, view, names, schemes))


def _tie(model: "PreTrainedModel") -> None:
    """Share the parameters that the model ties; transformers itself does so after loading."""
    for name, source in model.all_tied_weights_keys.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(source))


def _stacks(
    model: "PreTrainedModel", view: DequantizedView, names: WeightMap, schemes: dict[str, Scheme]
) -> dict[str, Scheme]:
    stacks = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in schemes:
            continue
        scheme = view.schemes.get(names.sources(name)[0].removesuffix(".weight"))
        if scheme is not None:
            stacks[name] = scheme
    return stacks
