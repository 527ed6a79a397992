"""Where a job's results go: to the shards and the journal of the rank that writes, or, for the others, nowhere."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...checkpoint.reader import Checkpoint
from ..block import BlockResult, Layer
from ..smoothing import Smoothing


class Sink(Protocol):
    """What tensors are written to; `ShardWriter` tells what its methods do."""

    checksums: dict[str, str]

    @property
    def names(self) -> Set[str]:
        """The tensors that were added."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Append a tensor of a checkpoint."""

    def read(self, name: str) -> Tensor:
        """A tensor that was added."""

    def commit(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """What to go on from, and what makes it durable."""

    def finish(self) -> dict[str, str]:
        """Give all files their names."""

    def close(self) -> None:
        """Let go of what is open."""


@dataclass(slots=True)
class Done:
    """Finished blocks by name, and what is to be said of their linears."""

    blocks: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What a finished block became, beside its codes. refined: vectors that refining changed, by name in the block."""

    smoothing: Smoothing
    refined: Mapping[str, Tensor]


class Record(Protocol):
    """What remembers finished blocks; `Journal` tells what its methods do."""

    done: Done

    def record(
        self, result: BlockResult, layers: Sequence[Layer], warnings: Sequence[str], sink: Sink
    ) -> None:
        """A block is finished."""

    def record_of(self, block: str) -> BlockRecord:
        """What a finished block became."""

    def flush(self) -> None:
        """Wait until what was recorded is on the disk."""

    def moved(self, out: Path) -> None:
        """The folder that is written is `out` now."""

    def remove(self) -> None:
        """The result is whole."""

    def close(self) -> None:
        """Let go of the folder."""


class NullSink:
    """A sink that keeps names alone: what is added is lost."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.checksums: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Only the name."""
        self.names.add(name)

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Only the name."""
        self.names.add(name)

    def read(self, name: str) -> Tensor:
        """Never possible."""
        raise LookupError(f"{name} was not kept")

    def commit(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """Nothing is to be made durable."""
        return {}, lambda: None

    def finish(self) -> dict[str, str]:
        """There are no files."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class NullJournal:
    """The record of a run that another rank, or nobody, writes down. done: what was finished before it."""

    done: Done

    def record(
        self, result: BlockResult, layers: Sequence[Layer], warnings: Sequence[str], sink: Sink
    ) -> None:
        """Nothing is written down."""

    def record_of(self, block: str) -> BlockRecord:
        """Never possible."""
        raise LookupError(f"what {block} became was not kept")

    def flush(self) -> None:
        """Nothing is on its way."""

    def moved(self, out: Path) -> None:
        """There is nothing."""

    def remove(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """There is nothing."""
