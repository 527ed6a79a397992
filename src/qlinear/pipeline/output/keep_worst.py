"""`--keep-worst`: the most sensitive linears, held back from the file until no others can be worse.

The worst layers are known only at the end of a run, but blocks are written as they finish. So the worst units so far
wait in memory, both as codes and in float. A unit is written as codes as soon as a worse one takes its place.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..block import Layer


@dataclass(frozen=True, slots=True)
class PackedUnit:
    """Linears that an engine may merge, so that all stay in float or none.

    tensors: as codes, by their names in the file. floats: the float weights, by the model's names.
    """

    layers: tuple[Layer, ...]
    tensors: Mapping[str, Tensor]
    floats: Mapping[str, Tensor]

    @property
    def error(self) -> float:
        """The largest error of its layers."""
        return max((layer.error for layer in self.layers), default=0.0)


class KeepWorst:
    """Holds back the `size` units of largest error."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        self._waiting: list[tuple[float, int, PackedUnit]] = []

    def offer(self, unit: PackedUnit) -> list[PackedUnit]:
        """Take a unit; returns the units that need not wait any longer."""
        if not self._size or not unit.layers:
            return [unit]
        self._count += 1
        heapq.heappush(self._waiting, (unit.error, -self._count, unit))
        return [heapq.heappop(self._waiting)[2]] if len(self._waiting) > self._size else []

    def decide(self) -> tuple[list[PackedUnit], list[PackedUnit]]:
        """The units that hold the `size` layers of largest error, and the other waiting ones."""
        errors = sorted((layer.error for _, _, unit in self._waiting for layer in unit.layers), reverse=True)
        least = errors[self._size - 1] if 0 < self._size <= len(errors) else 0.0
        in_order = [unit for _, _, unit in sorted(self._waiting, key=lambda entry: -entry[1])]
        return [u for u in in_order if u.error >= least], [u for u in in_order if u.error < least]
