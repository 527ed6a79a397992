"""One thread per core, for work that falls into independent parts.

Torch splits each operation over all cores and waits for the slowest. Rounding a weight takes hundreds of short
operations, so whenever another process holds a core for a moment, all cores wait. Independent parts, such as the
rounding of one linear and the next, run faster in one thread each, with torch's operations confined to that thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class CoreThreads:
    """A pool of `count` threads; made by `one_thread_per_core`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results of `work` on each item, in order. At most `count` + 1 items are started ahead."""
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(work, item))
                if len(pending) > self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)


@contextmanager
def one_thread_per_core(max_threads: int | None = None) -> Iterator[CoreThreads]:
    """Context manager: a pool of one thread per core, with torch's operations confined to the calling thread.

    max_threads: use fewer threads than cores; the cores are divided among them.
    """
    total = torch.get_num_threads()
    count = total if max_threads is None else max(1, min(max_threads, total))
    torch.set_num_threads(total // count)
    try:
        with ThreadPoolExecutor(count, "core") as pool:
            yield CoreThreads(pool, count)
    finally:
        torch.set_num_threads(total)


class CurrentThread:
    """The stand-in for `CoreThreads` that runs everything in the calling thread."""

    count = 1

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results of `work` on each item, in order."""
        return map(work, items)


@contextmanager
def on_each_core_or_here(
    device: torch.device, max_threads: int | None = None
) -> Iterator[CoreThreads | CurrentThread]:
    """Context manager: `one_thread_per_core` for work on the CPU; `CurrentThread` on a GPU or for one thread."""
    if device.type != "cpu" or (max_threads is not None and max_threads <= 1):
        yield CurrentThread()
        return
    with one_thread_per_core(max_threads) as cores:
        yield cores
