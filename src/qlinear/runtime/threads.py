"""The cores of this machine, each at work of its own.

An operation of torch's is shared out over all cores, and done when the last of them is. To pass over a weight takes
hundreds of short ones; where another process holds a core for a moment, all wait for it, each time. So what falls into
pieces, the rounding of one linear and the next, is done by a thread each, whose operations stay with it.
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
    """A thread for each of `count` cores; made by `apart`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self.count = pool, count

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work` of each item, in the items' order. Only one more than there are cores is begun before it is taken."""
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(self._pool.submit(work, item))
                if len(begun) > self.count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
            wait(begun)


@contextmanager
def one_thread_per_core(most: int | None = None) -> Iterator[CoreThreads]:
    """Inside, torch's operations keep to the thread that calls them, and there is such a thread for each core.

    most: threads, if fewer than the cores; each has as many cores then.
    """
    total = torch.get_num_threads()
    count = total if most is None else max(1, min(most, total))
    torch.set_num_threads(total // count)
    try:
        with ThreadPoolExecutor(count, "core") as pool:
            yield CoreThreads(pool, count)
    finally:
        torch.set_num_threads(total)


class CurrentThread:
    """In place of `Cores`: the thread that calls, and all that torch gives it."""

    count = 1

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work` of each item, in the items' order."""
        return map(work, items)


@contextmanager
def on_each_core_or_here(
    device: torch.device, most: int | None = None
) -> Iterator[CoreThreads | CurrentThread]:
    """`apart` for work on the CPU, `Here` on an accelerator, and where one thread is the most."""
    if device.type != "cpu" or (most is not None and most <= 1):
        yield CurrentThread()
        return
    with one_thread_per_core(most) as cores:
        yield cores
