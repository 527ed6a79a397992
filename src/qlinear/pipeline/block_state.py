"""What is to be done to a model's linears, what was found of a block, and what became of each linear."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..algorithms.base import RoundedInput
from ..algorithms.parts.smoothing_search import Search
from ..calibration.stats import InputStats
from ..checkpoint.layouts import MigrationPolicy
from ..checkpoint.layouts.base import Layout
from ..formats.scheme import Scheme
from ..tracing.experiment import Trace
from ..tracing.folds import Fold, InputGroup
from ..tracing.trace import Weight
from .smoothing import Smoothing

Progress = Callable[[str, int, int], None]
Migration = Literal["folded", "kept", "none"]
Algorithm = Literal["rtn", "gptq", "awq"]

# How wide a weight may be that is fitted to its rounded input: that takes six square matrices of its width where second
# moments are one, and a job is to fit a machine that holds little more than a block.
_WIDEST = 1 << 14


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of one linear that was quantized, or could keep its smoothing vector in float.

    scheme: None for float. error: relative, of its output on calibration tokens (of its weight where there were
    none, or nothing but that is rounded), measured on some hundreds of its outputs, spread evenly; rtn_error: what
    round to nearest would have given; both before the block is refined. share: of the squared errors of all
    linears. migration: where its smoothing lives; folded_into: the module that took it. alpha: of its smoothing;
    curve: what every (form, alpha) that was tried would have cost. group: the first of the linears that read what
    it reads.
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
class Recipe:
    """What is done to the linears of a model.

    schemes: of those that are quantized, by their names; empty to smooth alone. layout: what the result is written as.
    smooth: alpha, "auto" to search it for each group, "awq" for AWQ's own search, None for none. propagate: whether
    blocks see what the quantized blocks before them give. keep_worst: how many linears to leave in float.
    migration_scale: which vectors stay with their layers: those that nothing can take ("unfolded"), all ("always") or
    none ("never"). holders: the linears that can hold one. refine: how often the calibration set is seen to tune the
    scales of a block together.
    """

    schemes: Mapping[str, Scheme]
    layout: Layout
    algorithm: Algorithm = "rtn"
    smooth: float | Literal["auto", "awq"] | None = 0.5
    propagate: bool = False
    keep_worst: int = 0
    migration_scale: MigrationPolicy = "never"
    holders: frozenset[str] = frozenset()
    refine: int = 0

    @property
    def needs_data(self) -> bool:
        """Whether calibration text passes through the model."""
        return needs_data(self.smooth, self.algorithm, self.schemes.values(), self.keep_worst, self.refine)

    def fits(self, found: "Findings", weight: Weight) -> bool:
        """Whether a weight is fitted to its input as that will be rounded: see `job.fitting`. Experts in a stack are
        not, since there are many and each sees few of the tokens, nor what is too wide for it."""
        scheme = self.schemes.get(found.full_name(weight))
        rounds = scheme is not None and scheme.activation is not None
        if not (rounds and self.algorithm == "gptq" and self.propagate and weight.index is None):
            return False
        return weight.of(found.block).shape[1] <= _WIDEST

    def needs_hessian(self, found: "Findings", weight: Weight) -> bool:
        """Whether an algorithm asks for the second moments of what a weight reads, as it is before it is rounded."""
        chosen = self.algorithm == "gptq" and found.full_name(weight) in self.schemes
        return chosen and not self.fits(found, weight)

    @property
    def may_flip_signs(self) -> bool:
        """Whether smoothing may turn the signs of channels: see `smooth.turned`."""
        return self.smooth is not None and any(scheme.is_asymmetric for scheme in self.schemes.values())


@dataclass(slots=True)
class Findings:
    """A block, what calibration found of its inputs and their groups, and the smoothing that followed.

    name: the block's. stored_dtype: of a parameter of the block in the file. reversible: the folds that hold for
    negative vectors, too. searches: what was tried for each weight, where smoothing was searched. ranges: low and high
    (in,) of a static input, smoothed, by the first weight of a unit. rounded_inputs: by the same, what becomes of
    inputs that are rounded. refined: norm gains and other vectors as refining left them, by their names in the block,
    which itself has them only once its quantized self is run.
    """

    name: str
    block: nn.Module
    stored_dtype: Callable[[str], torch.dtype]
    stats: Mapping[Weight, InputStats] = field(default_factory=dict)
    groups: Sequence[InputGroup] = ()
    reversible: Sequence[Fold] = ()
    smoothing: Smoothing = field(default_factory=Smoothing)
    searches: dict[Weight, Search] = field(default_factory=dict)
    ranges: dict[Weight, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rounded_inputs: Mapping[Weight, tuple[RoundedInput, RoundedInput]] = field(default_factory=dict)
    refined: Mapping[str, Tensor] = field(default_factory=dict)

    def full_name(self, weight: Weight) -> str:
        """What plans call a weight: its module's name, or the parameter's where it is one matrix of a stack."""
        return joined(self.name, weight.module if weight.index is None else weight.name)

    def matrix(self, weight: Weight) -> Tensor:
        """A weight (out, in) as smoothed by now, float32."""
        return self.smoothing.apply(weight, weight.of(self.block).detach())

    def leader(self, weight: Weight) -> Weight | None:
        """The first of the weights that share this one's smoothing vector."""
        return next((group.weights[0] for group in self.groups if weight in group.weights), None)

    def weights(self) -> list[Weight]:
        """All that multiplies in the block, as far as is known: what was seen to, and every `nn.Linear`."""
        linears = [
            Weight(joined(name, "weight"))
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        seen = [weight for group in self.groups for weight in group.weights]
        return list(dict.fromkeys([*seen, *linears]))

    def merge_groups(self, weights: Sequence[Weight]) -> list[list[Weight]]:
        """`weights` parted into what an engine may merge: linears of one module that read the same tensor."""
        groups: dict[object, list[Weight]] = {}
        for weight in weights:
            stats = self.stats.get(weight)
            read = weight if stats is None else id(stats)
            groups.setdefault((weight.module.rpartition(".")[0], read), []).append(weight)
        return list(groups.values())


def needs_data(
    smooth: float | str | None, algorithm: Algorithm, schemes: Iterable[Scheme], keep_worst: int, refine: int
) -> bool:
    """Whether what is asked for looks at the inputs of linears."""
    is_static = any(scheme.is_static for scheme in schemes)
    return smooth is not None or algorithm != "rtn" or is_static or keep_worst > 0 or refine > 0


def unseen(found: Findings, trace: Trace, recipe: Recipe) -> Iterator[str]:
    """What a user should know of weights that calibration did not see, or could not make anything of."""
    unread = sorted(trace.unread - {product.weight.name for product in trace.products})
    if unread:
        names = ", ".join(joined(found.name, name) for name in unread)
        yield f"{names}: multiply otherwise than linear layers do, left as they are"
    chosen = [weight for weight in found.weights() if found.full_name(weight) in recipe.schemes]
    idle = [
        found.full_name(weight) + ("" if weight.index is None else f"[{weight.index}]")
        for weight in chosen
        if weight not in found.stats
    ]
    if idle:
        yield f"{', '.join(idle)}: no calibration token reached them, rounded by what their weights are alone"


def joined(prefix: str, name: str) -> str:
    """Two parts of a module's name as one."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
