"""From the tensors of a file to the parameters of a model, and back.

Most parameters are one tensor of the file, perhaps under another name. Some architectures differ: transformers
stacks the experts of a mixture into one three-dimensional parameter, splits a fused projection, or permutes
rows for its rotary embedding. It has rules for each (`WeightConverter`); they are used here as they are, block
by block, and reversed on writing, so that a result keeps the names and shapes of its source. This is the one
file that knows those internals of transformers.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .buffers import BufferPool
from .reader import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightTransform


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How some parameters come from some tensors of the file.

    sources: their names, in the converter's order. patterns: for each, the converter's pattern that matched it.
    targets: the model's names. converter: None where the one source is the one target, unchanged.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    converter: "WeightConverter | None" = None


class NameMap:
    """Which tensors of a checkpoint make which parameters and persistent buffers of a model.

    model: a `skeleton`. device: where parameters go. `unused` are the tensors that the model does not use, of a
    vision tower, say. Weights that the model ties, but that the file holds twice and different, are untied.

    Raises CheckpointError, before anything is loaded, if a parameter is missing or a shape differs.
    """

    def __init__(
        self, model: "PreTrainedModel", checkpoint: Checkpoint, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, torch.device(device)
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        recipes, self.unused = _find_recipes(model, checkpoint, self._state)
        self._recipes = {target: recipe for recipe in recipes for target in recipe.targets}
        self._key = self._find_ties()
        self._live: dict[str, Tensor] = {}
        self._pool = BufferPool()
        self._require_complete()

    def materialize(self, part: str) -> None:
        """Load every parameter and persistent buffer of a part: a module's name, a parameter's, or "" for all.

        A parameter that is loaded elsewhere, as a tied one may be, is shared and not read again.
        """
        self.assign(part, self.load(part))

    def load(self, part: str) -> dict[str, Tensor]:
        """Read what `assign` puts into a part. Touches no module: a thread may do it ahead of time."""
        found: dict[str, Tensor] = {}
        for name in self._names_in(part):
            key = self._key[name]
            if key not in self._live and key not in found and key in self._recipes:
                found.update(self._read(self._recipes[key]))
        return found

    def assign(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Put loaded tensors into a part."""
        for name in self._names_in(part):
            key = self._key[name]
            if key not in self._live and key in tensors:
                is_parameter = isinstance(self._state[name], nn.Parameter)
                tensor = tensors[key]
                self._live[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            if key in self._live:
                _put(self.model, name, self._live[key])

    def release(self, part: str, reuse: bool = True) -> None:
        """Put every parameter of a part back on meta; with `reuse` its memory serves the next `load`.

        Nothing may use those parameters afterwards, nor views of them. Buffers stay.
        """
        for name in self._names_in(part):
            current = _get(self.model, name)
            if isinstance(current, nn.Parameter) and not current.is_meta:
                _put(self.model, name, nn.Parameter(current.detach().to("meta"), requires_grad=False))
            key = self._key[name]
            loaded = self._live.get(key)
            if isinstance(loaded, nn.Parameter) and not self._is_in_use(key):
                del self._live[key]
                if reuse:
                    self._pool.give(loaded)

    def sources(self, name: str) -> list[str]:
        """Names in the file of the tensors that make a parameter of the model."""
        return list(self._recipes[self._key[name]].sources)

    def source_module(self, module_name: str) -> str:
        """Where the file keeps a linear layer: `<this>.weight` is its weight there, so scales go beside it.

        Raises CheckpointError where the weight is not one tensor of the file.
        """
        recipe = self._recipes[self._key[f"{module_name}.weight"]]
        if recipe.converter is not None:
            raise CheckpointError(
                f"{module_name} is made from {', '.join(recipe.sources)}: it has no name there"
            )
        return recipe.sources[0].removesuffix(".weight")

    def to_sources(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters, by the model's names, as tensors of the file, by the file's: conversions reversed.

        What is laid out as a parameter is, codes or scales for instance, can take its place. Parameters that come
        from the same tensors of the file (q, k and v from a fused projection) must be given together.
        """
        by_key = {self._key[name]: tensor for name, tensor in tensors.items()}
        found: dict[str, Tensor] = {}
        for recipe in {id(r): r for r in (self._recipes[key] for key in by_key)}.values():
            if missing := [target for target in recipe.targets if target not in by_key]:
                raise ValueError(f"{', '.join(recipe.sources)} cannot be made without {', '.join(missing)}")
            found.update(_reverse(recipe, [by_key[target] for target in recipe.targets], self.model))
        return found

    def _names_in(self, part: str) -> list[str]:
        """The model's names of the parameters and persistent buffers of a part."""
        prefix = f"{part}." if part else ""
        return [name for name in self._state if name == part or name.startswith(prefix)]

    def _is_in_use(self, key: str) -> bool:
        places = [name for name, other in self._key.items() if other == key]
        return any(_get(self.model, place) is self._live[key] for place in places)

    def _read(self, recipe: _Recipe) -> dict[str, Tensor]:
        """Read a recipe's sources, convert them, and return its targets on the device, in the model's dtype."""
        if recipe.converter is None:
            return {
                recipe.targets[0]: self._read_one(recipe.sources[0], self._state[recipe.targets[0]].dtype)
            }
        dtype = self._state[recipe.targets[0]].dtype
        found = [self._read_one(source, dtype) for source in recipe.sources]
        return _convert(recipe, found, self.model)

    def _read_one(self, source: str, dtype: torch.dtype) -> Tensor:
        """One tensor of the file as it is, but for its dtype and device."""
        info = self.checkpoint.info(source)
        cpu = torch.device("cpu")
        raw = self.checkpoint.read(source, self._pool.take(torch.Size(info.shape), info.dtype, cpu))
        if raw.dtype == dtype and self.device == cpu:
            return raw
        tensor = self._pool.take(raw.shape, dtype, self.device).copy_(raw)
        self._pool.give(raw)
        return tensor

    def _find_ties(self) -> dict[str, str]:
        """For every name of a parameter or buffer, the name among those tied to it that the file has."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            groups.setdefault(id(tensor), []).append(name)
        key: dict[str, str] = {}
        for names in groups.values():
            held = [name for name in names if name in self._recipes]
            apart = [name for name in held[1:] if not self._are_equal(held[0], name)]
            key |= {name: name if name in apart else (held or names)[0] for name in names}
        return key

    def _are_equal(self, a: str, b: str) -> bool:
        """Whether two parameters have the same bytes in the file."""
        first, second = self._recipes[a].sources, self._recipes[b].sources
        pairs = list(zip(first, second, strict=False))
        infos = [(self.checkpoint.info(x), self.checkpoint.info(y)) for x, y in pairs]
        return len(first) == len(second) and all(
            (x.dtype_name, x.shape) == (y.dtype_name, y.shape)
            and all(p == q for p, q in zip(self.checkpoint.chunks(m), self.checkpoint.chunks(n), strict=True))
            for (m, n), (x, y) in zip(pairs, infos, strict=True)
        )

    def _require_complete(self) -> None:
        missing = [
            name
            for name, tensor in self._state.items()
            if isinstance(tensor, nn.Parameter) and self._key[name] not in self._recipes
        ]
        if missing:
            rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(
                f"{self.checkpoint.path} lacks {', '.join(missing[:3])}{rest}, which {type(self.model).__name__} "
                "needs: give the checkpoint of this architecture, with all its shards"
            )


def _find_recipes(
    model: "PreTrainedModel", checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> tuple[list[_Recipe], list[str]]:
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
) -> _Recipe:
    """The recipe for a target, tried on tensors without data, so that its targets' names and shapes are known."""
    sources, patterns = zip(*found, strict=True)
    infos = [checkpoint.info(source) for source in sources]
    if patterns[0] is None:
        recipe = _Recipe(sources[:1], (), (target,))
        made = {target: torch.empty(infos[0].shape, device="meta")}
    else:
        recipe = _Recipe(sources, patterns, (target,), converter_of[patterns[0]])
        made = _convert(recipe, [torch.empty(info.shape, device="meta") for info in infos], model)
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


def _convert(recipe: _Recipe, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
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


def _reverse(recipe: _Recipe, tensors: Sequence[Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """The sources of a recipe, made back from its targets."""
    if recipe.converter is None:
        return {recipe.sources[0]: tensors[0]}
    reverse = recipe.converter.reverse_transform()
    if len(reverse.source_patterns) == 1:
        given = {reverse.source_patterns[0]: list(tensors)}
    else:
        given = {p: [tensor] for p, tensor in zip(reverse.source_patterns, tensors, strict=True)}
    made = _run(reverse, given, recipe.sources[0], model)
    found, seen = {}, Counter[str]()
    for source, pattern in zip(recipe.sources, recipe.patterns, strict=True):
        # The i-th source of a pattern comes back under that pattern with i in the place of its star.
        target = reverse.target_patterns[recipe.converter.source_patterns.index(pattern)]
        found[source] = made[target.replace("*", str(seen[pattern]))]
        seen[pattern] += 1
    return found


def _get(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that full name, None if the module has been replaced by one without it."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module._parameters.get(leaf, module._buffers.get(leaf))


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer of that full name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]
