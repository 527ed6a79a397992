"""The results of tracing: producers, the weights that read them, and the groups that share one smoothing vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experiment import Trace
from .trace import Weight


@dataclass(frozen=True, slots=True)
class Producer:
    """A module that can absorb a smoothing vector: the gain of a norm, or rows of a weight.

    size: number of channels. gain: names of the norm's vectors, gain first, then biases; empty if `weight` is set.
    offset: 1 if the norm multiplies by (1 + gain). rows: (start, stop, step) of the rows of `weight` that reach the
    readers; None for all. bias: name of the weight's bias. A three-dimensional weight with index None stands for all
    slices of its stack.
    """

    size: int
    gain: tuple[str, ...] = ()
    offset: float = 0.0
    weight: Weight | None = None
    bias: str | None = None
    rows: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Name of the producing module in the block."""
        return (self.gain[0] if self.weight is None else self.weight.name).rpartition(".")[0]


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A weight that reads a producer: input channel j is producer channel `channels[j]`, or -1 if unknown.

    channels: (in,) int64 on the CPU; the vectors given to the methods may be on any device. degree: the power of the
    producer that the input is proportional to, such as 2 behind a squared ReLU.
    """

    weight: Weight
    channels: Tensor
    degree: int = 1

    def spread(self, s: Tensor) -> Tensor:
        """The divisor (in,) of this weight's input when the producer is divided by s (size,); 1 where unknown."""
        channels = self.channels.to(s.device)
        return torch.where(channels < 0, torch.ones_like(s[:1]), s[channels.clamp(min=0)] ** self.degree)

    def gather(self, per_input: Tensor, size: int) -> Tensor:
        """The maximum, per producer channel (size,), of a statistic per input channel (in,); 0 where unread."""
        channels = self.channels.to(per_input.device)
        known, gathered = channels >= 0, per_input.new_zeros(size)
        return gathered.scatter_reduce_(0, channels[known], per_input[known], "amax")


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A producer and all weights that read it: dividing the producer by s multiplies the weights' columns by s."""

    producer: Producer
    readers: tuple[Reader, ...]

    @property
    def degree(self) -> int:
        """The power of the producer that its readers' inputs are proportional to."""
        return self.readers[0].degree

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that the fold changes."""
        producer = self.producer
        names = {*producer.gain} if producer.weight is None else {producer.weight.name}
        names |= {producer.bias} if producer.bias else set()
        return names | {reader.weight.name for reader in self.readers}

    @property
    def reached(self) -> Tensor:
        """Mask (size,) of the producer channels that may be scaled: the ones known to reach every reader."""
        reached = torch.ones(self.producer.size, dtype=torch.bool)
        for reader in self.readers:
            seen = torch.zeros_like(reached)
            seen[reader.channels[reader.channels >= 0]] = True
            reached &= seen
        return reached


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Weights that share one smoothing vector, and the fold that absorbs it (None if there is none)."""

    weights: tuple[Weight, ...]
    fold: Fold | None = None


def find_groups(trace: Trace, folds: Sequence[Fold]) -> list[InputGroup]:
    """Put each weight of a run in exactly one group: by the fold it reads from, else by the tensor it reads."""
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
