"""What passes between the steps of the job: a traced block, its statistics, and what became of it.

    Block        what tracing found: weights, groups that share an input, proved folds
    BlockStats   what calibration measured of the inputs
    BlockResult  what `quantize_block` returns: codes, float tensors that changed, a report per linear, notes

All are frozen. A `Block` refers to the module that is in memory; `quantize_block` reads it and does not change it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from ..algorithms.base import RoundedInput
from ..calibration.stats import InputStats
from ..checkpoint.layouts.base import QuantizedLinear
from ..tracing.folds import Fold, InputGroup
from ..tracing.trace import Weight
from .smoothing import SmoothedBlock, Smoothing

Progress = Callable[[str, int, int], None]
Migration = Literal["folded", "kept", "none"]


@dataclass(frozen=True, slots=True)
class MeasuredInput:
    """How rounding changes the input of some weights.

    low, high: the smoothed range (in,) of each channel, as it was chosen for a static input. halves: the statistics of
    the first and of the second half of each batch, which are mostly of different sequences.
    """

    low: Tensor
    high: Tensor
    halves: tuple[RoundedInput, RoundedInput]


# By the first of the weights that read the input.
RoundedInputs = Mapping[Weight, MeasuredInput]


@dataclass(frozen=True, slots=True)
class Layer:
    """The report of one linear that was quantized, or that could keep its smoothing vector in float.

    scheme: None for float. error: relative error of its output on calibration tokens, before the block is refined; of
    its weight where no token was seen or only the weight is rounded. It is measured on some hundreds of outputs, evenly
    spread. rtn_error: the same for round to nearest. share: this layer's part of the squared errors of all layers.
    migration: where its smoothing vector is. folded_into: the module that took it. group: the first linear that reads
    the same tensor. alpha: strength of its smoothing. curve: (form, alpha, error) of every strength that was tried.
    """

    name: str
    scheme: str | None
    error: float
    rtn_error: float
    share: float
    migration: Migration
    folded_into: str | None = None
    group: str | None = None
    alpha: float | None = None
    curve: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block (or the output head) in memory, and what a run of it showed.

    name: the module's name in the model. stored_dtype: the file's dtype of a parameter, by its name in the block.
    groups: weights that share an input, with the fold that takes their smoothing vector. reversible: the folds that
    hold for negative vectors as well. unread: parameters that multiply, but not as a linear layer does.
    """

    name: str
    module: nn.Module
    stored_dtype: Callable[[str], torch.dtype]
    groups: tuple[InputGroup, ...] = ()
    reversible: tuple[Fold, ...] = ()
    unread: tuple[str, ...] = ()

    def full_name(self, weight: Weight) -> str:
        """The name by which linears are selected: the module's, or the parameter's for one matrix of a stack."""
        return joined(self.name, weight.module if weight.index is None else weight.name)

    def matrix(self, weight: Weight) -> Tensor:
        """The weight (out, in), a view of the block's parameter."""
        return weight.of(self.module).detach()

    def leader(self, weight: Weight) -> Weight | None:
        """The first of the weights that share this one's smoothing vector."""
        return next((group.weights[0] for group in self.groups if weight in group.weights), None)

    def weights(self) -> list[Weight]:
        """Every weight that is known to multiply: those of the groups, and of every `nn.Linear`."""
        modules = self.module.named_modules()
        linears = [
            Weight(joined(name, "weight")) for name, module in modules if isinstance(module, nn.Linear)
        ]
        return list(dict.fromkeys([*chain.from_iterable(group.weights for group in self.groups), *linears]))

    def stacks(self, selected: Mapping[str, object]) -> list[str]:
        """The parameters of the block that are stacks of experts and are selected by their full names."""
        names = (name for name, _ in self.module.named_parameters())
        return [name for name in names if joined(self.name, name) in selected]


def _no_rounded_inputs(smoothed: SmoothedBlock) -> RoundedInputs:
    return {}


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What calibration measured of the inputs of a block.

    inputs: statistics by weight; weights that read one tensor share one object. is_measured: whether tokens passed.
    rounded_inputs: a pass of the calibration set through the smoothed block that measures how rounding changes its
    inputs; it is called once, where the algorithm needs that.
    """

    inputs: Mapping[Weight, InputStats] = field(default_factory=dict)
    is_measured: bool = False
    rounded_inputs: Callable[[SmoothedBlock], RoundedInputs] = _no_rounded_inputs

    def merge_groups(self, weights: Sequence[Weight]) -> list[list[Weight]]:
        """`weights` by what an engine may merge: linears of one module that read the same tensor."""
        groups: dict[object, list[Weight]] = {}
        for weight in weights:
            stats = self.inputs.get(weight)
            tensor = weight if stats is None else id(stats)
            groups.setdefault((weight.module.rpartition(".")[0], tensor), []).append(weight)
        return list(groups.values())


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The codes of one weight, or of a whole stack (experts, out, in).

    error, rtn_error: relative errors of its output on the sample, as `Layer` has them. note: for the user.
    """

    weight: Weight
    linear: QuantizedLinear
    error: float
    rtn_error: float
    note: str | None = None


@dataclass(frozen=True, slots=True)
class FloatHolder:
    """A linear that stays in float and can keep a smoothing vector beside its weight.

    name: the linear's, in the model. matrix: the smoothed weight (out, in), None if it did not change. vector: (in,).
    """

    name: str
    matrix: Tensor | None
    vector: Tensor | None
    layer: Layer


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that an engine may merge, so that all stay in float or none. layers: one for each quantized weight."""

    quantized: tuple[QuantizedWeight, ...]
    layers: tuple[Layer, ...]
    holders: tuple[FloatHolder, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What became of a block.

    name: the block's. units: linears, in the order in which they are written. stacks: experts, a unit of one weight for
    each stack. smoothing: what it does to the block's float parameters. changed: names in the block of the float
    parameters that differ from the source once the smoothing is applied. refined: vectors that refining changed.
    notes: what a user should know.
    """

    name: str
    units: tuple[Unit, ...]
    stacks: tuple[Unit, ...] = ()
    smoothing: Smoothing = field(default_factory=Smoothing)
    changed: frozenset[str] = frozenset()
    refined: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> list[QuantizedWeight]:
        """Every quantized weight, experts as the stacks that they are."""
        return [weight for unit in (*self.units, *self.stacks) for weight in unit.quantized]


def joined(prefix: str, name: str) -> str:
    """Two parts of a module's name as one."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
