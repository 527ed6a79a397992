"""Several processes that share one job, as torchrun starts them.

    torchrun --nproc-per-node 2 -m qlinear quantize MODEL OUT

All ranks do the same work with the same state, with three exceptions: the calibration set is split over the ranks, the
rounding of a block's linears is split over the ranks, and only the main rank writes. Results are sent to all ranks, and
so are errors, since the other ranks would otherwise wait forever. Data passes through main memory over gloo; tensors
from an accelerator arrive on the receiver's accelerator.

A single process is the case of one rank: it sends nothing and waits for nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import QLinearError
from .device import CPU, moved

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a job, seen from one: this is number `rank` of `size`, and computes on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def present(cls) -> "Ranks":
        """The processes of torch.distributed's default group; one rank if there is no group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the output."""
        return self.rank == 0

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Context manager: a QLinearError raised on one rank is raised on all, after every rank has exited."""
        if self.size == 1:
            yield
            return
        local: QLinearError | None = None
        try:
            yield
        except QLinearError as error:
            local = error
        raised: list[QLinearError | None] = [None] * self.size
        dist.all_gather_object(raised, local)
        for failure in raised:
            if failure is not None:
                failure.known_to_all = True
                raise failure

    def gather(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on every rank, in rank order. An error on one rank is raised on all."""
        with self.raising_together():
            local = work()
        if self.size == 1:
            return [local]
        results: list[Any] = [None] * self.size
        dist.all_gather_object(results, moved(local, CPU))
        return [moved(error, self.device) for error in results]

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, which runs on the main rank only, on this rank's device. All ranks raise its errors."""
        results: list[Any] = [None]
        with self.raising_together():
            results[0] = work() if self.is_main else None
        if self.size > 1:
            results[0] = moved(results[0], CPU)
            dist.broadcast_object_list(results, src=0)
        result: T = moved(results[0], self.device)
        return result

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part of the items.

        The parts in rank order are `items`. The main rank's part is empty only if `items` is.
        """
        bounds = [-(-len(items) * rank // self.size) for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    def split(
        self, items: Sequence[T], work: Callable[[T], R], over: Callable[..., Iterator[R]] = map
    ) -> Iterator[R]:
        """The results of `work` on each item, in order. Each item is done by one rank, and all ranks get the results.

        over: how a rank maps `work` over its items: `map` or `CoreThreads.map`. With one rank, results are yielded as
        they come.
        """
        if self.size == 1:
            yield from over(work, items)
            return
        done = self.gather(lambda: list(over(work, items[self.rank :: self.size])))
        for i in range(len(items)):
            yield done[i % self.size][i // self.size]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks."""
        if self.size > 1:
            total = x.cpu()
            dist.all_reduce(total)
            x = total.to(x.device)
        return x


@contextmanager
def torchrun_group() -> Iterator[Ranks]:
    """Context manager: joins the processes that torchrun started into a group."""
    # The other ranks wait while one works alone, such as copying unchanged files; that may take long.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks.present()
    finally:
        dist.destroy_process_group()
