"""Smoothing: moving the difficulty of outlier channels from the activations to the weights.

    y = x Wᵀ + b = (x / s) (W · diag(s))ᵀ + b          s (in,)

With per-token int8 activations a channel 50 times larger than the rest leaves the rest two codes to live on.
Dividing it by s makes it ordinary; the weight's column, multiplied by s, can carry it (SmoothQuant, Xiao et al.
2022, eq. 3-4). The division costs nothing where a producer can take it: a norm's gain, or the rows of the linear
that made the channel. Where none can, `s` stays with the layer as its migration scale.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..tracing.folds import Fold, Producer
from ..tracing.trace import Weight


@dataclass(slots=True)
class Smoothing:
    """What smoothing does to a block's weights.

    columns: (in,) multiplies a weight's columns. rows: (out,) divides a producer's rows. migration: (in,) stays with a
    layer to divide its input; its `columns` hold the same vector. folded_into: the producer's name, for the report.
    changed: names of the gains and biases that were divided in place.
    """

    columns: dict[Weight, Tensor] = field(default_factory=dict)
    rows: dict[Weight, Tensor] = field(default_factory=dict)
    migration: dict[Weight, Tensor] = field(default_factory=dict)
    folded_into: dict[Weight, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def apply(self, weight: Weight, matrix: Tensor, kept: bool = True) -> Tensor:
        """The smoothed weight (out, in), float32: diag(1/rows) · W · diag(columns).

        kept: whether a vector that stays with the layer is multiplied in; a layer left in float does without.
        """
        smoothed = matrix.float()
        if weight in self.columns and (kept or weight not in self.migration):
            smoothed = torch.mul(smoothed, self.columns[weight], out=_unless_same(smoothed, matrix))
        if weight in self.rows:
            rows = self.rows[weight].unsqueeze(1)
            smoothed = torch.div(smoothed, rows, out=_unless_same(smoothed, matrix))
        return smoothed

    def apply_in_place(self, weight: Weight, matrix: Tensor) -> None:
        """Smooth a weight (out, in) where it lies, as a layer left in float has it."""
        if matrix.dtype != torch.float32:
            matrix.copy_(self.apply(weight, matrix, kept=False))
            return
        if weight in self.columns and weight not in self.migration:
            matrix.mul_(self.columns[weight])
        if weight in self.rows:
            matrix.div_(self.rows[weight].unsqueeze(1))

    def touches(self, weight: Weight) -> bool:
        """Whether `apply` changes this weight."""
        return weight in self.columns or weight in self.rows

    def keep(self, weight: Weight, s: Tensor) -> None:
        """Leave `s` with the layer."""
        self.columns[weight] = self.migration[weight] = s

    def fold(self, block: nn.Module, fold: Fold, s: Tensor, stored: torch.dtype) -> None:
        """Divide `s` (size,), or its root where the producer is squared, out of the producer, and multiply it into what
        reads it.

        A norm's gain changes here and now, rounded to the dtype that the file holds; the readers get the ratio of
        the old gain to the rounded one, so that they compensate exactly the producer that is stored.
        """
        s = s.masked_fill(~fold.reached.to(s.device), 1.0) ** (1 / fold.degree)
        producer = fold.producer
        if producer.weight is None:
            s = _into_gain(block, producer, s, stored)
        else:
            s = self.rows[producer.weight] = _into_rows(block, producer, s, stored)
        self.changed |= {*producer.gain, *([producer.bias] if producer.bias else [])}
        for reader in fold.readers:
            self.columns[reader.weight] = reader.spread(s)
            self.folded_into[reader.weight] = producer.name


def _unless_same(copy: Tensor, original: Tensor) -> Tensor | None:
    """Where the next result may go: into what is a copy already; fresh pages cost more than the arithmetic."""
    return None if copy is original else copy


def _into_gain(block: nn.Module, producer: Producer, s: Tensor, stored: torch.dtype) -> Tensor:
    gain, *biases = (block.get_parameter(name) for name in producer.gain)
    whole = gain.float() + producer.offset
    folded = (whole / s - producer.offset).to(stored)
    left = folded.float() + producer.offset
    # Where the gain rounds to nothing there is nothing to compensate with: that channel is left alone.
    usable = (left != 0) & (whole != 0)
    with torch.no_grad():
        s = torch.where(usable, whole / left, 1.0)
        gain.copy_(torch.where(usable, folded.to(gain.dtype), gain))
        for bias in biases:
            bias.copy_((bias.float() / s).to(stored))
    return s


def _into_rows(block: nn.Module, producer: Producer, s: Tensor, stored: torch.dtype) -> Tensor:
    if producer.rows is not None:
        inside = torch.zeros_like(s, dtype=torch.bool)
        inside[slice(*producer.rows)] = True
        s = s.masked_fill(~inside, 1.0)
    if producer.bias is not None:
        bias = block.get_parameter(producer.bias)
        with torch.no_grad():
            bias.copy_((bias.float() / s).to(stored))
    return s
