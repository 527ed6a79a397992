"""`--keep-worst`: the most sensitive linears, held back from the file until it is known that no others are worse.

Which layers lose most is known at the end of a run, but blocks are written as they finish. So the worst so far wait in
memory, as codes and in float, and are written as codes when worse ones take their places.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..block_state import Layer


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that an engine may merge, so that all of them stay in float or none: what is written either way."""

    layers: tuple[Layer, ...]
    tensors: Mapping[str, Tensor]
    floats: Mapping[str, Tensor]

    @property
    def error(self) -> float:
        """The largest of its layers'."""
        return max((layer.error for layer in self.layers), default=0.0)


class KeepWorst:
    """Holds the `size` units of largest error."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        self._held: list[tuple[float, int, Unit]] = []

    def offer(self, unit: Unit) -> list[Unit]:
        """Take a unit in; returns those that need not be held any longer."""
        if not self._size or not unit.layers:
            return [unit]
        self._count += 1
        heapq.heappush(self._held, (unit.error, -self._count, unit))
        return [heapq.heappop(self._held)[2]] if len(self._held) > self._size else []

    def decide(self) -> tuple[list[Unit], list[Unit]]:
        """The units that the `size` layers of largest error are in, and the others that are still held."""
        errors = sorted((layer.error for _, _, unit in self._held for layer in unit.layers), reverse=True)
        least = errors[self._size - 1] if 0 < self._size <= len(errors) else 0.0
        in_order = [unit for _, _, unit in sorted(self._held, key=lambda entry: -entry[1])]
        return [u for u in in_order if u.error >= least], [u for u in in_order if u.error < least]
