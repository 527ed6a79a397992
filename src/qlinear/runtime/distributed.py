"""Several processes at one job, as torchrun starts them: who does what, and what they tell each other.

    torchrun --nproc-per-node 2 -m qlinear quantize MODEL OUT

Every rank does the same and knows the same, except for three things: the calibration set is split over the ranks, so
is the rounding of a block's linears, and only the first rank, the leader, writes. What a rank finds is told to all;
so is what goes wrong on one, or the others would wait for it. What passes between them lies in main memory, over gloo;
tensors from an accelerator arrive on the receiver's own.

One process alone is the case of one rank: nothing is told, and nothing waits.
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
    """This process among those of a job: number `rank` of `size`, which computes on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def present(cls) -> "Ranks":
        """All processes of torch.distributed's group; one alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether it is this rank that writes."""
        return self.rank == 0

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Inside, each rank is on its own; a QLinearError that one of them raises, all raise when all are done."""
        if self.size == 1:
            yield
            return
        mine: QLinearError | None = None
        try:
            yield
        except QLinearError as error:
            mine = error
        raised: list[QLinearError | None] = [None] * self.size
        dist.all_gather_object(raised, mine)
        for each in raised:
            if each is not None:
                each.known_to_all = True
                raise each

    def gather(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, in their order; what one of them raises, all raise."""
        with self.raising_together():
            mine = work()
        if self.size == 1:
            return [mine]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, moved(mine, CPU))
        return [moved(each, self.device) for each in told]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the leader, which alone does it, on this rank's device; what it raises, all raise."""
        told: list[Any] = [None]
        with self.raising_together():
            told[0] = work() if self.is_main else None
        if self.size > 1:
            told[0] = moved(told[0], CPU)
            dist.broadcast_object_list(told, src=0)
        here: T = moved(told[0], self.device)
        return here

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items that fall to this rank: neighbours, so that all parts in turn are `items`; some to the leader, if
        there are any."""
        bounds = [-(-len(items) * rank // self.size) for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    def split(
        self, items: Sequence[T], work: Callable[[T], R], over: Callable[..., Iterator[R]] = map
    ) -> Iterator[R]:
        """`work` of each item, done by one rank and known to all, in the items' order; one by one on a rank alone.

        over: how a rank does its items, as `map` does or `Cores.map`.
        """
        if self.size == 1:
            yield from over(work, items)
            return
        done = self.gather(lambda: list(over(work, items[self.rank :: self.size])))
        for i in range(len(items)):
            yield done[i % self.size][i // self.size]

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x`, which becomes the sum of what it is on every rank."""
        if self.size > 1:
            total = x.cpu()
            dist.all_reduce(total)
            x = total.to(x.device)
        return x


@contextmanager
def torchrun_group() -> Iterator[Ranks]:
    """Inside, the processes that torchrun started are a group."""
    # Whatever one rank does alone, such as copying what nothing touched, the others wait for.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks.present()
    finally:
        dist.destroy_process_group()
