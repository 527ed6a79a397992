"""Recipes: how transformers makes a model's parameters from the tensors of a file, and the way back.

Most parameters are one tensor of the file, perhaps under another name. Some architectures differ: transformers
stacks the experts of a mixture into one three-dimensional parameter, splits a fused projection, or permutes
rows for its rotary embedding. It has rules for each (`WeightConverter`); they are used here as they are, a
parameter at a time, and reversed. This is the one file that knows those internals of transformers.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform


@dataclass(frozen=True, slots=True)
class Recipe:
    """How some parameters come from some tensors of the file.

    sources: their names, in the converter's order. patterns: for each, the converter's pattern that matched it.
    targets: the model's names. converter: None where the one source is the one target, unchanged.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    converter: "WeightConverter | None" = None


def find_conversions(
    model: "PreTrainedModel", checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> tuple[list[Recipe], list[str]]:
    """Recipes for all that the checkpoint holds for the model, and the tensors that the model does not use."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, known = model.base_model_prefix, dict(state)
    groups: dict[str, list[tuple[str, str | None]]] = {}
    unused = []
    for source in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if target not in state and source in state:  # it has the model's own name already
            target, pattern = source, None
        if target in state and (pattern is not None or target not in groups):
            groups.setdefault(target, []).append((source, pattern))
        else:
            unused.append(source)
    recipes = [
        _plan(target, found, converter_of, checkpoint, model, state) for target, found in groups.items()
    ]
    return recipes, unused


def _plan(
    target: str,
    found: list[tuple[str, str | None]],
    converter_of: Mapping[str, "WeightConverter"],
    checkpoint: Checkpoint,
    model: "PreTrainedModel",
    state: Mapping[str, Tensor],
) -> Recipe:
    """The recipe for a target, tried on tensors without data, so that its targets' names and shapes are known."""
    sources, patterns = zip(*found, strict=True)
    infos = [checkpoint.info(source) for source in sources]
    if patterns[0] is None:
        recipe = Recipe(sources[:1], (), (target,))
        made = {target: torch.empty(infos[0].shape, device="meta")}
    else:
        recipe = Recipe(sources, patterns, (target,), converter_of[patterns[0]])
        made = convert(recipe, [torch.empty(info.shape, device="meta") for info in infos], model)
        recipe = dataclasses.replace(recipe, targets=tuple(made))
    for name, tensor in made.items():
        if name in state and tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{infos[0].file} holds {sources[0]} of shape {list(infos[0].shape)}, which makes {name} "
                f"{list(tensor.shape)} where the config asks for {list(state[name].shape)}: mend one of them"
            )
    return recipe


def _run(
    converter: "WeightTransform", tensors: dict[str, list[Tensor]], name: str, model: "PreTrainedModel"
) -> dict[str, Tensor]:
    """A converter's operations on tensors by source pattern; the results by target pattern."""
    found: dict[str, Any] = dict(tensors)
    for operation in converter.operations:  # type: ignore[attr-defined]
        found = operation.convert(
            found,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    return {key: value[0] if isinstance(value, list) else value for key, value in found.items()}


def convert(recipe: Recipe, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """The targets that a recipe makes from its sources, by the model's names."""
    assert recipe.converter is not None
    by_pattern: dict[str, list[Tensor]] = {}
    for pattern, tensor in zip(recipe.patterns, tensors, strict=True):
        by_pattern.setdefault(pattern, []).append(tensor)
    try:
        made = _run(recipe.converter, by_pattern, recipe.targets[0], model)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{recipe.targets[0]} cannot be made from {recipe.sources[0]} and what belongs to it ({reason}): "
            "download the checkpoint again, or mend its config.json"
        ) from None
    # The converter names its results by pattern; one of them is part of the target's full name.
    full = recipe.targets[0].replace("*.", "0.")
    prefix, _, suffix = next((full.partition(key) for key in made if key in full), ("", "", ""))
    return {prefix + key + suffix: tensor for key, tensor in made.items()}


def is_stack(recipe: Recipe) -> bool:
    """Whether a converter only stacks matrices, or stacks them and puts two stacks side by side: experts, mostly."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [] if recipe.converter is None else [(type(op), vars(op)) for op in recipe.converter.operations]
    stack, side_by_side = (
        (MergeModulelist, {"dim": 0}),
        (Concatenate, {"dim": 1, "num_shards_attribute": None}),
    )
    return len(recipe.targets) == 1 and steps in ([stack], [stack, side_by_side])


def parts(recipe: Recipe, target: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where each source of a plain or stacking recipe goes: the part of the target that it is to be read into."""
    if recipe.converter is None:
        yield recipe.sources[0], target
        return
    # By pattern, gate and up for instance, then by expert: as the converter collects and then concatenates them.
    patterns = [p for p in recipe.converter.source_patterns if p in recipe.patterns]
    pieces = dict(zip(patterns, target.chunk(len(patterns), dim=1), strict=True))
    seen = Counter[str]()
    for source, pattern in zip(recipe.sources, recipe.patterns, strict=True):
        yield source, pieces[pattern][seen[pattern]]
        seen[pattern] += 1


def reverse(recipe: Recipe, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """The sources of a recipe, made back from its targets."""
    if recipe.converter is None:
        return {recipe.sources[0]: tensors[0]}
    back = recipe.converter.reverse_transform()
    if len(back.source_patterns) == 1:
        given = {back.source_patterns[0]: list(tensors)}
    else:
        given = {p: [tensor] for p, tensor in zip(back.source_patterns, tensors, strict=True)}
    made = _run(back, given, recipe.sources[0], model)
    found, seen = {}, Counter[str]()
    for source, pattern in zip(recipe.sources, recipe.patterns, strict=True):
        # The i-th source of a pattern comes back under that pattern with i in the place of its star.
        target = back.target_patterns[recipe.converter.source_patterns.index(pattern)]
        found[source] = made[target.replace("*", str(seen[pattern]))]
        seen[pattern] += 1
    return found
