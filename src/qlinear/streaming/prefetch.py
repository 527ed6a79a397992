"""The weights of the next block, on their way to an accelerator while this one is worked on."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from .weight_map import WeightMap


class Prefetch:
    """Loads one part of a model ahead, in a thread of its own; `take` gives what it loaded."""

    def __init__(self, names: WeightMap) -> None:
        self._names = names
        self._thread = ThreadPoolExecutor(1, "weights")
        self._pending: tuple[str, Future[dict[str, Tensor]]] | None = None

    def begin(self, part: str) -> None:
        """Load a part, unless it is on its way; another that is gives up its place."""
        if self._pending is None or self._pending[0] != part:
            self.drop()
            self._pending = part, self._thread.submit(self._names.load, part)

    def take(self, part: str) -> dict[str, Tensor]:
        """What was loaded of this part ahead of time, for `NameMap.assign`; nothing if that was another's."""
        if self._pending is None or self._pending[0] != part:
            return {}
        loaded, self._pending = self._pending[1], None
        return loaded.result()

    def flush(self) -> None:
        """Wait until nothing is loaded any more: only then may memory be given up for the next part."""
        if self._pending is not None:
            wait([self._pending[1]])

    def drop(self) -> None:
        """Give up what was loaded, or could not be."""
        self.flush()
        if self._pending is not None and self._pending[1].exception() is None:
            self._names.give_up(self._pending[1].result().values())
        self._pending = None
