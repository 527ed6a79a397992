"""What experiments find and proofs confirm: producers, what reads them, and the groups that share a vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experiment import Trace
from .trace import Weight


@dataclass(frozen=True, slots=True)
class Producer:
    """What can take a smoothing vector: the gain of a norm, or the rows of a weight.

    size: channels. gain: the vectors, gain first, biases after; empty if `weight` is set. offset: 1 where the norm
    multiplies by (1 + gain). rows: (start, stop, step), which rows of `weight` reach the readers, all if None; bias:
    its bias. A weight with an index of None that has three dimensions stands for all its slices.
    """

    size: int
    gain: tuple[str, ...] = ()
    offset: float = 0.0
    weight: Weight | None = None
    bias: str | None = None
    rows: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """The module that produces, by its name in the block."""
        return (self.gain[0] if self.weight is None else self.weight.name).rpartition(".")[0]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A weight and where its input comes from: input channel j is producer channel `channels[j]`, -1 if unknown.

    Vectors may be on any device, `channels` are on the CPU.

    degree: the input grows by that power of the producer: 2 behind a squared ReLU.
    """

    weight: Weight
    channels: Tensor
    degree: int = 1

    def spread(self, s: Tensor) -> Tensor:
        """What s (size,), divided out of the producer, divides this weight's input by (in,); 1 where unknown."""
        channels = self.channels.to(s.device)
        return torch.where(channels < 0, torch.ones_like(s[:1]), s[channels.clamp(min=0)] ** self.degree)

    def gather(self, per_input: Tensor, size: int) -> Tensor:
        """A statistic per input channel (in,) as its maximum per producer channel (size,); 0 where unread."""
        channels = self.channels.to(per_input.device)
        known, gathered = channels >= 0, per_input.new_zeros(size)
        return gathered.scatter_reduce_(0, channels[known], per_input[known], "amax")


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A producer and all the weights that read it."""

    producer: Producer
    readers: tuple[Reader, ...]

    @property
    def degree(self) -> int:
        """To which power the producer reaches its readers."""
        return self.readers[0].degree

    @property
    def touched(self) -> set[str]:
        """The parameters that it changes, by name."""
        producer = self.producer
        own = (
            {*producer.gain, producer.bias}
            if producer.weight is None
            else {producer.weight.name, producer.bias}
        )
        return {name for name in own if name} | {reader.weight.name for reader in self.readers}

    @property
    def reached(self) -> Tensor:
        """Which producer channels (size,) may be scaled: those that are known to reach every reader."""
        reached = torch.ones(self.producer.size, dtype=torch.bool)
        for reader in self.readers:
            seen = torch.zeros_like(reached)
            seen[reader.channels[reader.channels >= 0]] = True
            reached &= seen
        return reached


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Weights that share one smoothing vector, and the fold that would take it (None: nothing can)."""

    weights: tuple[Weight, ...]
    fold: Fold | None = None


def find_groups(trace: Trace, folds: Sequence[Fold]) -> list[InputGroup]:
    """Each weight of a run in exactly one group: by the fold that it reads from, else by the tensor it reads."""
    fold_of = {reader.weight: fold for fold in folds for reader in fold.readers}
    members: dict[object, list[Weight]] = {}
    fold_at: dict[object, Fold] = {}
    placed: set[Weight] = set()
    for product in trace.products:
        fold = fold_of.get(product.weight)
        key = product.source if fold is None else fold.producer
        if fold is not None:
            fold_at[key] = fold
        if product.weight not in placed:
            members.setdefault(key, []).append(product.weight)
            placed.add(product.weight)
    return [InputGroup(tuple(weights), fold_at.get(key)) for key, weights in members.items()]
