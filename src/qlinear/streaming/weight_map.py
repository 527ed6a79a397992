"""A model filled part by part from the tensors of a file, and its parameters put back under the file's names.

A part is in memory while it is used; its memory then serves the next one. Results are written under the names
and in the shapes of their source, whatever transformers made of them on loading (`recipes`).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..runtime.device import CPU, Uploader
from .buffer_pool import BufferPool
from .hf_conversion import Recipe, convert, find_conversions, is_stack, parts, reverse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightMap:
    """Which tensors of a checkpoint make which parameters and persistent buffers of a model.

    model: a `skeleton`. device: where parameters go. `unused` are the tensors that the model does not use, of a
    vision tower, say. Weights that the model ties, but that the file holds twice and different, are untied.

    Raises CheckpointError, before anything is loaded, if a parameter is missing or a shape differs.
    """

    def __init__(self, model: "PreTrainedModel", checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self._uploader = None if device == CPU else Uploader(device)
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        recipes, self.unused = find_conversions(model, checkpoint, self._state)
        self._recipes = {target: recipe for recipe in recipes for target in recipe.targets}
        self._key = self._find_ties()
        self._places: dict[str, list[str]] = {}
        for name, key in self._key.items():
            self._places.setdefault(key, []).append(name)
        self._live: dict[str, Tensor] = {}
        self._pool = BufferPool()
        self._require_complete()

    def materialize(self, part: str) -> None:
        """Load every parameter and persistent buffer of a part: a module's name, a parameter's, or "" for all.

        A parameter that is loaded elsewhere, as a tied one may be, is shared and not read again.
        """
        self.assign(part, self.load(part))

    def load(self, part: str, known: Collection[str] = ()) -> dict[str, Tensor]:
        """Read what `assign` puts into a part, but for what is `known`. Touches no module: a thread may do it ahead of
        time, as long as nothing is released meanwhile."""
        found: dict[str, Tensor] = {}
        with nullcontext() if self._uploader is None else self._uploader.uploading():
            for name in self.names_in(part):
                key = self._key[name]
                if key in self._recipes and not (key in self._live or key in found or key in known):
                    found.update(self._read(self._recipes[key]))
        if self._uploader is not None:
            self._uploader.hand_over(found.values())
        return found

    def give_up(self, tensors: Iterable[Tensor]) -> None:
        """Loaded tensors that are not assigned after all: their memory serves the next `load`."""
        for tensor in tensors:
            self._pool.give(tensor)

    def assign(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Put loaded tensors into a part."""
        for name in self.names_in(part):
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
        for name in self.names_in(part):
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

    def parts_of(self, name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The file's name of each matrix of a stack, and the view of it that is this matrix."""
        return parts(self._recipes[self._key[name]], stack)

    def made_with(self, name: str) -> list[str]:
        """The parameters that come from the same tensors of the file as this one, itself included."""
        return list(self._recipes[self._key[name]].targets)

    def is_one_tensor(self, module_name: str) -> bool:
        """Whether a linear layer's weight is one tensor of the file, and not cut out of or put together from others."""
        return self._recipes[self._key[f"{module_name}.weight"]].converter is None

    def source_module(self, module_name: str) -> str:
        """Where the file keeps a linear layer: `<this>.weight` is its weight there, so scales go beside it.

        Of a layer whose weight is another's (a tied output head) it is where its own would be. Raises
        CheckpointError where the weight is not one tensor of the file.
        """
        weight = f"{module_name}.weight"
        owner = self._key[weight]
        recipe = self._recipes[owner]
        if recipe.converter is not None:
            raise CheckpointError(
                f"{module_name} is made from {', '.join(recipe.sources)}: it has no name there"
            )
        source = recipe.sources[0]
        if owner != weight:
            source = source.removesuffix(owner) + weight if source.endswith(owner) else weight
        return source.removesuffix(".weight")

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
            found.update(reverse(recipe, [by_key[target] for target in recipe.targets], self.model))
        return found

    def names_in(self, part: str) -> list[str]:
        """The model's names of the parameters and persistent buffers of a part."""
        prefix = f"{part}." if part else ""
        return [name for name in self._state if name == part or name.startswith(prefix)]

    def _is_in_use(self, key: str) -> bool:
        return any(_get(self.model, place) is self._live[key] for place in self._places[key])

    def _read(self, recipe: Recipe) -> dict[str, Tensor]:
        """Read a recipe's sources, convert them, and return its targets on the device, in the model's dtype."""
        first = self._state[recipe.targets[0]]
        if recipe.converter is None or is_stack(recipe):
            target = self._pool.take(first.shape, first.dtype, self.device)
            for source, part in parts(recipe, target):
                self._read_into(source, part)
            return {recipe.targets[0]: target}
        infos = [self.checkpoint.info(source) for source in recipe.sources]
        found = [self._pool.take(torch.Size(info.shape), first.dtype, self.device) for info in infos]
        for source, tensor in zip(recipe.sources, found, strict=True):
            self._read_into(source, tensor)
        return {name: tensor.contiguous() for name, tensor in convert(recipe, found, self.model).items()}

    def _read_into(self, source: str, out: Tensor) -> None:
        """One tensor of the file, but for its dtype and device, which are those of `out`."""
        if self._uploader is None:
            self.checkpoint.read_as(source, out)
        else:
            self.checkpoint.read_to_device(source, out, self._uploader)

    def _find_ties(self) -> dict[str, str]:
        """For every name of a parameter or buffer, the name among those tied to it that the file has."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            groups.setdefault(id(tensor), []).append(name)
        key: dict[str, str] = {}
        for names in groups.values():
            held = [name for name in names if name in self._recipes]
            one_thread_per_core = [name for name in held[1:] if not self._are_equal(held[0], name)]
            key |= {name: name if name in one_thread_per_core else (held or names)[0] for name in names}
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
