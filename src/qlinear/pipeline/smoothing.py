"""What smoothing does to the parameters of a block, as a value: nothing is changed until it is applied.

    y = x Wᵀ + b = (x / s) (W · diag(s))ᵀ + b          s (in,)

With per-token int8 activations a channel 50 times larger than the rest leaves the rest two codes. Dividing the channel
by s makes it ordinary; the weight's column, multiplied by s, can carry it (SmoothQuant, Xiao et al. 2022, eq. 3-4). The
division is free where a producer can take it: a norm's gain, or the rows of the linear that made the channel. Where
none can, s stays with the layer as its migration scale.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..algorithms.parts.smoothing_search import Search
from ..tracing.folds import Fold, Producer
from ..tracing.trace import Weight


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What smoothing does to a block's weights, norms and biases.

    columns: (in,) multiplies a weight's columns. rows: (out,) divides a producer's rows. migration: (in,) stays with a
    layer and divides its input; `columns` holds the same vector. folded_into: the producer's name, for the report.
    vectors: gains and biases as the file will hold them, by their names in the block, in the dtype of the file.
    """

    columns: Mapping[Weight, Tensor] = field(default_factory=dict)
    rows: Mapping[Weight, Tensor] = field(default_factory=dict)
    migration: Mapping[Weight, Tensor] = field(default_factory=dict)
    folded_into: Mapping[Weight, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def touched(self) -> list[Weight]:
        """The weights that it changes."""
        return list(dict.fromkeys([*self.columns, *self.rows]))

    def touches(self, weight: Weight) -> bool:
        """Whether it changes this weight."""
        return weight in self.columns or weight in self.rows

    def apply(self, weight: Weight, matrix: Tensor, kept: bool = True) -> Tensor:
        """The smoothed weight (out, in), float32: diag(1/rows) · W · diag(columns).

        kept: whether a vector that stays with the layer is multiplied in. A layer left in float does without.
        """
        smoothed = matrix.float()
        if weight in self.columns and (kept or weight not in self.migration):
            smoothed = torch.mul(smoothed, self.columns[weight], out=_unless_same(smoothed, matrix))
        if weight in self.rows:
            rows = self.rows[weight].unsqueeze(1)
            smoothed = torch.div(smoothed, rows, out=_unless_same(smoothed, matrix))
        return smoothed

    def apply_in_place(self, weight: Weight, matrix: Tensor) -> None:
        """Smooth a weight (out, in) in memory, as a layer left in float has it."""
        if matrix.dtype != torch.float32:
            matrix.copy_(self.apply(weight, matrix, kept=False))
            return
        if weight in self.columns and weight not in self.migration:
            matrix.mul_(self.columns[weight])
        if weight in self.rows:
            matrix.div_(self.rows[weight].unsqueeze(1))

    def apply_to(self, block: nn.Module) -> None:
        """Smooth the whole block in memory."""
        for name, vector in self.vectors.items():
            block.get_parameter(name).detach().copy_(vector)
        for weight in self.touched:
            self.apply_in_place(weight, weight.of(block).detach())

    @contextmanager
    def applied_to(self, block: nn.Module) -> Iterator[None]:
        """Context manager: the block is smoothed in memory, and has its own parameters again afterwards."""
        names = dict.fromkeys([*self.vectors, *(weight.name for weight in self.touched)])
        before = {name: block.get_parameter(name).detach().clone() for name in names}
        self.apply_to(block)
        try:
            yield
        finally:
            for name, parameter in before.items():
                block.get_parameter(name).detach().copy_(parameter)

    def keep(self, weight: Weight, s: Tensor) -> "Smoothing":
        """With `s` (in,) left beside the layer as its migration scale."""
        return replace(self, columns={**self.columns, weight: s}, migration={**self.migration, weight: s})

    def fold(self, block: nn.Module, fold: Fold, s: Tensor, stored: torch.dtype) -> "Smoothing":
        """With `s` (size,) divided out of a producer and multiplied into what reads it.

        Behind a square it is the root of `s` that the producer is divided by. A norm's gain is rounded to the dtype
        that the file holds (`stored`); the readers get the ratio of the old gain to the rounded one, so that they
        compensate exactly the producer that is stored.
        """
        s = s.masked_fill(~fold.reached.to(s.device), 1.0) ** (1 / fold.degree)
        producer, rows = fold.producer, dict(self.rows)
        if producer.weight is None:
            s, vectors = self._into_gain(block, producer, s, stored)
        else:
            s = _only_its_rows(producer, s)
            vectors = self._divided_bias(block, [producer.bias] if producer.bias else [], s, stored)
            rows[producer.weight] = s
        return replace(
            self,
            rows=rows,
            columns={**self.columns, **{reader.weight: reader.spread(s) for reader in fold.readers}},
            folded_into={**self.folded_into, **{reader.weight: producer.name for reader in fold.readers}},
            vectors={**self.vectors, **vectors},
        )

    def _vector(self, block: nn.Module, name: str) -> Tensor:
        """A gain or bias as it is by now."""
        return self.vectors[name] if name in self.vectors else block.get_parameter(name).detach()

    def _into_gain(
        self, block: nn.Module, producer: Producer, s: Tensor, stored: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The vector that the stored gain amounts to, and the gain and biases as they become."""
        name, *biases = producer.gain
        gain = self._vector(block, name)
        whole = gain.float() + producer.offset
        folded = (whole / s - producer.offset).to(stored)
        remaining = folded.float() + producer.offset
        # A gain that rounds to zero leaves nothing to compensate with: that channel is not scaled.
        usable = (remaining != 0) & (whole != 0)
        s = torch.where(usable, whole / remaining, 1.0)
        vectors = {name: torch.where(usable, folded, gain.to(stored))}
        return s, vectors | self._divided_bias(block, biases, s, stored)

    def _divided_bias(
        self, block: nn.Module, names: list[str], s: Tensor, stored: torch.dtype
    ) -> dict[str, Tensor]:
        biases = {name: self._vector(block, name) for name in names}
        return {name: (bias.float() / s).to(stored) for name, bias in biases.items()}


@dataclass(frozen=True, slots=True)
class SmoothedBlock:
    """The smoothing of a block and how it was chosen.

    searches: what was tried for each weight, where the strength was searched. unsmoothed: groups that nothing can take
    a vector for.
    """

    smoothing: Smoothing = field(default_factory=Smoothing)
    searches: Mapping[Weight, Search] = field(default_factory=dict)
    unsmoothed: tuple[tuple[Weight, ...], ...] = ()


def _unless_same(copy: Tensor, original: Tensor) -> Tensor | None:
    """Where the next result may go: into a tensor that is a copy already; fresh pages cost more than arithmetic."""
    return None if copy is original else copy


def _only_its_rows(producer: Producer, s: Tensor) -> Tensor:
    """s (size,), 1 for the rows of a fused projection that do not feed the readers."""
    if producer.rows is None:
        return s
    inside = torch.zeros_like(s, dtype=torch.bool)
    inside[slice(*producer.rows)] = True
    return s.masked_fill(~inside, 1.0)
