"""A cache for values that kernels derive from tensors, such as packed weights.

A value is kept while its tensors exist unchanged. It is computed again after one of them is written to, moved or
replaced, and dropped when one of them is deleted. It is not part of a module's state: it is neither saved nor copied.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    state: tuple[tuple[int, int], ...]
    value: object


class PackCache:
    """Values keyed by the identity of the tensors they were computed from."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, compute: Callable[[], T], *tensors: Tensor) -> T:
        """`compute()`, called again only after one of the tensors changed."""
        key, state = tuple(map(id, tensors)), tuple(map(_state, tensors))
        entry = self._entries.get(key)
        if entry is None or entry.state != state or not _is_of(entry, tensors):
            owners = tuple(weakref.ref(tensor, lambda _: self._entries.pop(key, None)) for tensor in tensors)
            entry = self._entries[key] = _Entry(owners, state, compute())
        return entry.value  # type: ignore[return-value]


def _state(tensor: Tensor) -> tuple[int, int]:
    """A value that changes when the tensor is written to or moved."""
    # Inference tensors have no version counter: a packed one must not be written to.
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def _is_of(entry: _Entry, tensors: tuple[Tensor, ...]) -> bool:
    return all(owner() is tensor for owner, tensor in zip(entry.owners, tensors, strict=True))
