"""Maps a model's parameters to the tensors of a file, and loads them part by part.

A part of the model is in memory while it is used. Its memory is then reused for the next part. Results are written
under the names and in the shapes of the source: what transformers converts on loading is converted back.
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
from .hf_conversion import Conversion, convert, find_conversions, is_stack, parts, reverse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightMap:
    """Which tensors of a checkpoint make which parameters and persistent buffers of a model.

    model: with its parameters on meta. device: where parameters are loaded to. unused: the names of tensors that the
    model does not use, such as a vision tower's. Weights that the model ties, but of which the file has two different
    copies, are untied. Raises CheckpointError, before anything is loaded, if a parameter is missing or a shape differs.
    """

    def __init__(self, model: "PreTrainedModel", checkpoint: Checkpoint, device: torch.device = CPU) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self._uploader = None if device == CPU else Uploader(device)
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        conversions, self.unused = find_conversions(model, checkpoint, self._state)
        self._conversions = {
            target: conversion for conversion in conversions for target in conversion.targets
        }
        self._key = self._find_ties()
        self._places: dict[str, list[str]] = {}
        for name, key in self._key.items():
            self._places.setdefault(key, []).append(name)
        self._live: dict[str, Tensor] = {}
        self._pool = BufferPool()
        self._require_complete()

    def materialize(self, part: str) -> None:
        """Load every parameter and persistent buffer of a part: the name of a module or a parameter, or "" for all.

        A tied parameter that is loaded already is shared, and not read again.
        """
        self.assign(part, self.load(part))

    def load(self, part: str, known: Collection[str] = ()) -> dict[str, Tensor]:
        """Read the tensors of a part for `assign`, except the `known` ones.

        It changes no module, so a thread may call it ahead of time, as long as nothing is released meanwhile.
        """
        loaded: dict[str, Tensor] = {}
        with nullcontext() if self._uploader is None else self._uploader.uploading():
            for name in self.names_in(part):
                key = self._key[name]
                if key in self._conversions and not (key in self._live or key in loaded or key in known):
                    loaded.update(self._read(self._conversions[key]))
        if self._uploader is not None:
            self._uploader.hand_over(loaded.values())
        return loaded

    def recycle(self, tensors: Iterable[Tensor]) -> None:
        """Reuse the memory of loaded tensors that are not assigned after all."""
        for tensor in tensors:
            self._pool.give(tensor)

    def assign(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors that `load` returned into the modules of a part."""
        for name in self.names_in(part):
            key = self._key[name]
            if key not in self._live and key in tensors:
                is_parameter = isinstance(self._state[name], nn.Parameter)
                tensor = tensors[key]
                self._live[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            if key in self._live:
                _put(self.model, name, self._live[key])

    def release(self, part: str, reuse: bool = True) -> None:
        """Put every parameter of a part back on meta. Buffers stay.

        reuse: whether the next `load` may take their memory. Nothing may use those parameters afterwards, or views of
        them.
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
        """The file's names of the tensors that make a parameter of the model."""
        return list(self._conversions[self._key[name]].sources)

    def parts_of(self, name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The file's name of each matrix of a stack, with the view of the stack that is this matrix."""
        return parts(self._conversions[self._key[name]], stack)

    def made_with(self, name: str) -> list[str]:
        """The parameters that are made from the same tensors of the file as this one, itself included."""
        return list(self._conversions[self._key[name]].targets)

    def is_one_tensor(self, module_name: str) -> bool:
        """Whether a linear's weight is one tensor of the file, rather than split or combined from others."""
        return self._conversions[self._key[f"{module_name}.weight"]].converter is None

    def source_module(self, module_name: str) -> str:
        """The file's name of a linear: its weight there is `<name>.weight`, and scales are written beside it.

        For a tied weight (an output head) it is the name that an untied one would have. Raises CheckpointError where
        the weight is not one tensor of the file.
        """
        weight = f"{module_name}.weight"
        owner = self._key[weight]
        conversion = self._conversions[owner]
        if conversion.converter is not None:
            raise CheckpointError(
                f"{module_name} is made from {', '.join(conversion.sources)}: it has no name there"
            )
        source = conversion.sources[0]
        if owner != weight:
            source = source.removesuffix(owner) + weight if source.endswith(owner) else weight
        return source.removesuffix(".weight")

    def to_sources(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by the model's names, converted back to tensors by the file's names.

        Codes or scales can stand for a parameter where they have its layout. Parameters that are made from the same
        tensors of the file (q, k and v from a fused projection) must be given together.
        """
        by_key = {self._key[name]: tensor for name, tensor in tensors.items()}
        sources: dict[str, Tensor] = {}
        for conversion in {id(r): r for r in (self._conversions[key] for key in by_key)}.values():
            if missing := [target for target in conversion.targets if target not in by_key]:
                raise ValueError(
                    f"{', '.join(conversion.sources)} cannot be made without {', '.join(missing)}"
                )
            sources.update(reverse(conversion, [by_key[target] for target in conversion.targets], self.model))
        return sources

    def names_in(self, part: str) -> list[str]:
        """The names in the model of a part's parameters and persistent buffers."""
        prefix = f"{part}." if part else ""
        return [name for name in self._state if name == part or name.startswith(prefix)]

    def _is_in_use(self, key: str) -> bool:
        return any(_get(self.model, place) is self._live[key] for place in self._places[key])

    def _read(self, conversion: Conversion) -> dict[str, Tensor]:
        """The targets of a conversion, on the device and in the model's dtype, read from its sources."""
        first = self._state[conversion.targets[0]]
        if conversion.converter is None or is_stack(conversion):
            target = self._pool.take(first.shape, first.dtype, self.device)
            for source, part in parts(conversion, target):
                self._read_into(source, part)
            return {conversion.targets[0]: target}
        infos = [self.checkpoint.info(source) for source in conversion.sources]
        tensors = [self._pool.take(torch.Size(info.shape), first.dtype, self.device) for info in infos]
        for source, tensor in zip(conversion.sources, tensors, strict=True):
            self._read_into(source, tensor)
        return {
            name: tensor.contiguous() for name, tensor in convert(conversion, tensors, self.model).items()
        }

    def _read_into(self, source: str, out: Tensor) -> None:
        """Read a tensor of the file into `out`, converted to its dtype and device."""
        if self._uploader is None:
            self.checkpoint.read_as(source, out)
        else:
            self.checkpoint.read_to_device(source, out, self._uploader)

    def _find_ties(self) -> dict[str, str]:
        """For each parameter or buffer, its name in `_conversions`: its own, or that of one tied to it."""
        groups: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            groups.setdefault(id(tensor), []).append(name)
        key: dict[str, str] = {}
        for names in groups.values():
            stored = [name for name in names if name in self._conversions]
            untied = [name for name in stored[1:] if not self._are_equal(stored[0], name)]
            key |= {name: name if name in untied else (stored or names)[0] for name in names}
        return key

    def _are_equal(self, a: str, b: str) -> bool:
        """Whether the file has the same bytes for two parameters."""
        first, second = self._conversions[a].sources, self._conversions[b].sources
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
            if isinstance(tensor, nn.Parameter) and self._key[name] not in self._conversions
        ]
        if missing:
            prefix = f"{self.model.base_model_prefix}."
            if not any(name.startswith(prefix) for name in missing):
                raise CheckpointError(
                    f"{self.checkpoint.path} has no language model head (it lacks {missing[0]}), as encoders and "
                    "classifiers: give the checkpoint of a causal language model"
                )
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
