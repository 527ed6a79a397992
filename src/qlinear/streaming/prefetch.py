"""Loads the next block's weights in a thread of its own while the current block computes."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from .weight_map import WeightMap


class Prefetch:
    """Loads one part of a model at a time; `begin` starts, `take` returns the tensors."""

    def __init__(self, names: WeightMap) -> None:
        self._names = names
        self._thread = ThreadPoolExecutor(1, "weights")
        self._pending: tuple[str, Future[dict[str, Tensor]]] | None = None

    def begin(self, part: str) -> None:
        """Start to load a part, unless it is being loaded already. A pending load of another part is dropped."""
        if self._pending is None or self._pending[0] != part:
            self.drop()
            self._pending = part, self._thread.submit(self._names.load, part)

    def take(self, part: str) -> dict[str, Tensor]:
        """The tensors that were loaded for this part, for `WeightMap.assign`; empty if another part is pending."""
        if self._pending is None or self._pending[0] != part:
            return {}
        loaded, self._pending = self._pending[1], None
        return loaded.result()

    def flush(self) -> None:
        """Wait for the pending load. Memory may be released for reuse only afterwards."""
        if self._pending is not None:
            wait([self._pending[1]])

    def drop(self) -> None:
        """Discard the pending load, whether it succeeded or not."""
        self.flush()
        if self._pending is not None and self._pending[1].exception() is None:
            self._names.recycle(self._pending[1].result().values())
        self._pending = None
