"""What a kernel derives from tensors (a packed layout), remembered for as long as they live unchanged.

It is no part of a module's state: nothing of it is saved or copied, and a tensor that was written to, moved or replaced
has it made again. An entry goes when one of its tensors does.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    state: tuple[tuple[int, int], ...]
    made: object


class Memory:
    """Values by the identity of the tensors that they were made from."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, make: Callable[[], T], *tensors: Tensor) -> T:
        """`make()`, called again only after one of the tensors changed."""
        key, state = tuple(map(id, tensors)), tuple(map(_state, tensors))
        entry = self._entries.get(key)
        if entry is None or entry.state != state or not _is_of(entry, tensors):
            owners = tuple(weakref.ref(tensor, lambda _: self._entries.pop(key, None)) for tensor in tensors)
            entry = self._entries[key] = _Entry(owners, state, make())
        return entry.made  # type: ignore[return-value]


def _state(tensor: Tensor) -> tuple[int, int]:
    """What writing to a tensor, or moving it, changes."""
    # Inference tensors count no versions: those that were packed must not be written to.
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _is_of(entry: _Entry, tensors: tuple[Tensor, ...]) -> bool:
    return all(owner() is tensor for owner, tensor in zip(entry.owners, tensors, strict=True))
