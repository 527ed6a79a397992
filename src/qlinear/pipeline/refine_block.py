"""`--refine`: the scales and gains of a block tuned together, so that its output comes nearest to the original's.

Each linear was quantized for its own output. Only the block's output shows what all errors together do, and what the
quantized blocks before it did to its input:

    minimise over scales and gains   Σ_tokens |block_Q(x̂) - block(x)|²      by Adam (Kingma & Ba 2014), codes fixed

x̂ is the output of the quantized blocks before, x that of the original ones. The objective is BRECQ's (Li et al. 2021),
for parameters that cost nothing to serve: scales of weights and of static inputs, gains of norms and biases (norm
tweaking; Li et al. 2023). Gradients pass the rounding of inputs straight through. The result is kept only if it is
better on the whole set, after rounding to what the file holds.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoint.layouts.base import QuantizedLinear
from ..formats.rounding import QuantizedTensor
from ..formats.scales import storable_scale
from ..streaming.lanes import Call, Lane
from ..tracing.trace import Weight
from .block import Block, BlockResult, QuantizedWeight, Unit
from .propagate import dequantized_weight, quantizing_inputs

# The first step moves a scale by this share of itself, about one step of bfloat16; later steps are smaller.
_RATE = 4e-3
_BETAS = (0.9, 0.95)


def hidden_state(output: Any) -> Tensor:
    """What a block passes on: its output, or the first of its outputs."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def refine_block(
    block: Block,
    result: BlockResult,
    lanes: Sequence[Lane],
    targets: Sequence[Tensor],
    epochs: int,
    shared: Container[str] = (),
) -> BlockResult | None:
    """The result with other scales and vectors, or None where no gradient passes through the block.

    lanes: the calibration set as the quantized blocks before left it, waiting before the block; they stay there.
    targets: the original block's output for each lane (batch, seq_len, hidden). epochs: passes over the lanes.
    shared: parameters that other blocks hold too; they stay as they are.
    """
    start = [member for weight in result.quantized for member in _members(weight)]
    refined = refine(block, start, lanes, targets, epochs, shared)
    if refined is None:
        return None
    by_weight = {member.weight: member.linear for member in refined.quantized}
    units, stacks = (
        tuple(_with_linears(unit, by_weight) for unit in part) for part in (result.units, result.stacks)
    )
    changed = result.changed | refined.vectors.keys()
    return replace(result, units=units, stacks=stacks, refined=refined.vectors, changed=changed)


def _members(quantized: QuantizedWeight) -> Iterator[QuantizedWeight]:
    """The weight itself, or each expert of a stack."""
    codes = quantized.linear.weight
    if codes.codes.dim() == 2:
        yield quantized
        return
    for index, member in enumerate(codes.unstack()):
        weight = Weight(quantized.weight.name, False, index)
        yield replace(quantized, weight=weight, linear=replace(quantized.linear, weight=member))


def _with_linears(unit: Unit, by_weight: Mapping[Weight, QuantizedLinear]) -> Unit:
    """The unit with other linears; the experts of a stack are joined again."""

    def linear(quantized: QuantizedWeight) -> QuantizedLinear:
        members = [by_weight[member.weight] for member in _members(quantized)]
        if quantized.linear.weight.codes.dim() == 2:
            return members[0]
        return replace(members[0], weight=QuantizedTensor.stack([member.weight for member in members]))

    return replace(unit, quantized=tuple(replace(q, linear=linear(q)) for q in unit.quantized))


@dataclass(frozen=True, slots=True)
class Refined:
    """Weights with their scales, and the block's vectors by their names in it."""

    quantized: Sequence[QuantizedWeight]
    vectors: Mapping[str, Tensor]


@torch.no_grad()
def refine(
    block: Block,
    quantized: Sequence[QuantizedWeight],
    lanes: Sequence[Lane],
    targets: Sequence[Tensor],
    epochs: int,
    shared: Container[str] = (),
) -> Refined | None:
    """Scales and vectors that bring the block's output nearest to `targets`, never further away than at the start.

    Arguments as for `refine_block`; quantized: without stacks. None where no gradient passes through the block.
    """
    start, tuned = Refined(quantized, {}), _Tuned(block, quantized, shared)
    optimizer = torch.optim.Adam(tuned.factors, lr=_RATE, betas=_BETAS)
    steps = epochs * len(lanes)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    for _ in range(epochs):
        for lane, target in zip(lanes, targets, strict=True):
            with torch.enable_grad():
                loss = _distance(block.module, tuned.scaled(), lane, target) / target.square().sum()
                if not loss.requires_grad:
                    return None
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    after = tuned.scaled(rounds=True)
    before, now = (
        sum(
            float(_distance(block.module, state, lane, target))
            for lane, target in zip(lanes, targets, strict=True)
        )
        for state in (start, after)
    )
    return after if now < before else start


class _Tuned:
    """A block with a factor for every scale, and for every element of its vectors."""

    def __init__(self, block: Block, quantized: Sequence[QuantizedWeight], shared: Container[str]) -> None:
        self._block, self._quantized = block, list(quantized)
        self._of_weights = [_ones(weight.linear.weight.scale) for weight in quantized]
        inputs = [_learned_input_scale(weight.linear) for weight in quantized]
        self._of_inputs = [None if scale is None else _ones(scale) for scale in inputs]
        self._vectors = {
            name: vector.detach().float()
            for name, vector in block.module.named_parameters()
            if vector.dim() == 1 and vector.is_floating_point() and name not in shared
        }
        self._of_vectors = [_ones(vector) for vector in self._vectors.values()]

    @property
    def factors(self) -> list[Tensor]:
        """All that is learned."""
        inputs = [factor for factor in self._of_inputs if factor is not None]
        return [*self._of_weights, *inputs, *self._of_vectors]

    def scaled(self, rounds: bool = False) -> Refined:
        """The block with its factors applied, differentiable by them. rounds: to what the file holds."""
        factors = zip(self._quantized, self._of_weights, self._of_inputs, strict=True)
        linears = [
            replace(weight, linear=_scaled(weight.linear, factor, input_factor, rounds))
            for weight, factor, input_factor in factors
        ]
        vectors = {
            name: vector * factor
            for (name, vector), factor in zip(self._vectors.items(), self._of_vectors, strict=True)
        }
        if rounds:
            stored = self._block.stored_dtype
            vectors = {name: vector.to(stored(name)).float() for name, vector in vectors.items()}
        return Refined(linears, vectors)


def _learned_input_scale(linear: QuantizedLinear) -> Tensor | None:
    """The static input scale; None for a global scale, which changes nothing but how the dynamic ones are rounded."""
    activation = linear.scheme.activation
    return None if activation is None or activation.has_global_scale else linear.input_scale


def _ones(like: Tensor) -> Tensor:
    return torch.ones_like(like).requires_grad_()


def _distance(block: nn.Module, state: Refined, lane: Lane, target: Tensor) -> Tensor:
    """The squared distance of the block's output from the target."""
    parameters = _parameters(block, state.quantized)
    for name, vector in state.vectors.items():
        parameters[name] = vector.to(block.get_parameter(name).dtype)

    def run(call: Call) -> Tensor:
        with quantizing_inputs(block, state.quantized):
            output = functional_call(block, parameters, call.args, call.kwargs)
        return (hidden_state(output).float() - target).square().sum()

    return lane.rehearse(run)


def _scaled(
    linear: QuantizedLinear, factor: Tensor, input_factor: Tensor | None, rounds: bool
) -> QuantizedLinear:
    """A linear with its scales times factors. rounds: to the dtype they are stored in."""
    scale = linear.weight.scale * factor
    if rounds:
        scale = storable_scale(scale, linear.weight.format, linear.scale_dtype, linear.weight.global_scale)
    input_scale = linear.input_scale
    if input_scale is not None and input_factor is not None:
        input_scale = input_scale * input_factor
    return replace(linear, weight=replace(linear.weight, scale=scale), input_scale=input_scale)


def _parameters(block: nn.Module, quantized: Sequence[QuantizedWeight]) -> dict[str, Tensor]:
    """The values of the codes of a block, by the names of its parameters; of a stack, all matrices."""
    matrices: dict[str, list[tuple[int, Tensor]]] = {}
    for member in quantized:
        weight, values = member.weight, dequantized_weight(member.linear)
        matrices.setdefault(weight.name, []).append(
            (weight.index or 0, values.mT if weight.transposed else values)
        )
    parameters = {}
    for name, parts in matrices.items():
        like = block.get_parameter(name)
        in_order = [values for _, values in sorted(parts, key=lambda part: part[0])]
        whole = in_order[0] if len(in_order) == 1 else torch.stack(in_order)
        parameters[name] = whole.reshape(like.shape).to(like.dtype)
    return parameters
