"""How transformers makes a model's parameters from the tensors of a file, and the way back.

Most parameters are one tensor of the file, perhaps under another name. Some architectures differ: transformers stacks
the experts of a mixture into one three-dimensional parameter, splits a fused projection, or permutes rows for its
rotary embedding. Its rules for that (`WeightConverter`) are applied here one parameter at a time, and reversed.

This is the only file that uses those internals of transformers.
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
class Conversion:
    """How some parameters of the model are made from some tensors of the file.

    sources: the tensors' names, in the converter's order. patterns: for each source, the converter's pattern that
    matched it. targets: the parameters' names. converter: None where the only source is the only target, unchanged.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    converter: "WeightConverter | None" = None


def find_conversions(
    model: "PreTrainedModel", checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> tuple[list[Conversion], list[str]]:
    """Conversions for all parameters that the checkpoint has, and the names of tensors that the model does not use.

    state: the model's parameters and persistent buffers by name. Raises CheckpointError where a shape differs.
    """
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
    conversions = [
        _plan(target, matches, converter_of, checkpoint, model, state) for target, matches in groups.items()
    ]
    return conversions, unused


def _plan(
    target: str,
    matches: list[tuple[str, str | None]],
    converter_of: Mapping[str, "WeightConverter"],
    checkpoint: Checkpoint,
    model: "PreTrainedModel",
    state: Mapping[str, Tensor],
) -> Conversion:
    """The conversion for a target. It is run on meta tensors, to learn its targets' names and shapes.

    matches: the sources, each with the converter's pattern that matched it.
    """
    sources, patterns = zip(*matches, strict=True)
    infos = [checkpoint.info(source) for source in sources]
    if patterns[0] is None:
        conversion = Conversion(sources[:1], (), (target,))
        targets = {target: torch.empty(infos[0].shape, device="meta")}
    else:
        conversion = Conversion(sources, patterns, (target,), converter_of[patterns[0]])
        targets = convert(conversion, [torch.empty(info.shape, device="meta") for info in infos], model)
        conversion = dataclasses.replace(conversion, targets=tuple(targets))
    for name, tensor in targets.items():
        if name in state and tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{infos[0].file} holds {sources[0]} of shape {list(infos[0].shape)}, which makes {name} "
                f"{list(tensor.shape)} where the config asks for {list(state[name].shape)}: mend one of them"
            )
    return conversion


def _run(
    converter: "WeightTransform", tensors: dict[str, list[Tensor]], name: str, model: "PreTrainedModel"
) -> dict[str, Tensor]:
    """Apply a converter's operations. tensors: by source pattern. Returns the results by target pattern."""
    results: dict[str, Any] = dict(tensors)
    for operation in converter.operations:  # type: ignore[attr-defined]
        results = operation.convert(
            results,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    return {key: value[0] if isinstance(value, list) else value for key, value in results.items()}


def convert(conversion: Conversion, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """The targets of a conversion by the model's names, made from the tensors of its sources.

    Raises CheckpointError where the tensors do not fit together.
    """
    assert conversion.converter is not None
    by_pattern: dict[str, list[Tensor]] = {}
    for pattern, tensor in zip(conversion.patterns, tensors, strict=True):
        by_pattern.setdefault(pattern, []).append(tensor)
    try:
        results = _run(conversion.converter, by_pattern, conversion.targets[0], model)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{conversion.targets[0]} cannot be made from {conversion.sources[0]} and what belongs to it ({reason}): "
            "download the checkpoint again, or mend its config.json"
        ) from None
    # The converter names its results by pattern. One of the patterns is part of the first target's full name.
    full = conversion.targets[0].replace("*.", "0.")
    prefix, _, suffix = next((full.partition(key) for key in results if key in full), ("", "", ""))
    return {prefix + key + suffix: tensor for key, tensor in results.items()}


def is_stack(conversion: Conversion) -> bool:
    """Whether a conversion only stacks matrices, or stacks them and concatenates two stacks, as for experts."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = (
        []
        if conversion.converter is None
        else [(type(op), vars(op)) for op in conversion.converter.operations]
    )
    stack, side_by_side = (
        (MergeModulelist, {"dim": 0}),
        (Concatenate, {"dim": 1, "num_shards_attribute": None}),
    )
    return len(conversion.targets) == 1 and steps in ([stack], [stack, side_by_side])


def parts(conversion: Conversion, target: Tensor) -> Iterator[tuple[str, Tensor]]:
    """For each source of a plain or stacking conversion, the part of the target that it is read into."""
    if conversion.converter is None:
        yield conversion.sources[0], target
        return
    # By pattern (gate, then up), and then by expert: the converter's own order of stacking and concatenating.
    patterns = [p for p in conversion.converter.source_patterns if p in conversion.patterns]
    pieces = dict(zip(patterns, target.chunk(len(patterns), dim=1), strict=True))
    seen = Counter[str]()
    for source, pattern in zip(conversion.sources, conversion.patterns, strict=True):
        yield source, pieces[pattern][seen[pattern]]
        seen[pattern] += 1


def reverse(conversion: Conversion, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """The sources of a conversion by the file's names, made back from its targets."""
    if conversion.converter is None:
        return {conversion.sources[0]: tensors[0]}
    back = conversion.converter.reverse_transform()
    if len(back.source_patterns) == 1:
        given = {back.source_patterns[0]: list(tensors)}
    else:
        given = {p: [tensor] for p, tensor in zip(back.source_patterns, tensors, strict=True)}
    results = _run(back, given, conversion.sources[0], model)
    sources, seen = {}, Counter[str]()
    for source, pattern in zip(conversion.sources, conversion.patterns, strict=True):
        # The i-th source of a pattern comes back under that pattern, with i for its star.
        target = back.target_patterns[conversion.converter.source_patterns.index(pattern)]
        sources[source] = results[target.replace("*", str(seen[pattern]))]
        seen[pattern] += 1
    return sources
