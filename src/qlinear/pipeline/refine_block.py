"""`--refine`: the scales and gains of a block tuned together, to bring its output as near to the original's as may be.

Each linear was rounded for its own output. What its block makes of the errors of all of them, and of what the quantized
blocks before it did to the input, only the block's output tells:

    minimise over scales and gains   Σ_tokens |block_Q(x̂) - block(x)|²      by Adam (Kingma & Ba 2014), codes fixed

x̂ is what the quantized blocks before give, x what the original ones gave. It is the objective of BRECQ (Li et al.
2021), for no more than what costs nothing to serve: scales of weights and of static inputs, and the vectors that a
block holds anyway, gains of norms and biases (norm tweaking; Li et al. 2023). Gradients pass the rounding of inputs
straight through. What was found is kept only if it is better on the whole set, rounded to what the file holds.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoint.layouts.base import QuantizedLinear
from ..streaming.lanes import Call, Lane
from .block_state import Findings
from .propagate import dequantized_weight, quantizing_inputs
from .quantize_groups import Rounded

# The first step moves a scale by this share of itself, about one of bfloat16's; later ones by less and less.
_RATE = 4e-3
_BETAS = (0.9, 0.95)


def hidden_state(output: Any) -> Tensor:
    """What a block passes on: its output, or the first of its outputs."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


@dataclass(frozen=True, slots=True)
class Refined:
    """Linears with their scales, and the block's vectors by their names in it."""

    rounded: Sequence[Rounded]
    vectors: Mapping[str, Tensor]


@torch.no_grad()
def refine(
    found: Findings,
    rounded: Sequence[Rounded],
    lanes: Sequence[Lane],
    targets: Sequence[Tensor],
    epochs: int,
    shared: Container[str] = (),
) -> Refined | None:
    """What brings the block's output nearest to `targets`; never further away than it was with `rounded`.

    None where no gradient comes back through the block, whose own code then keeps it from doing so.

    lanes: the calibration set as the quantized blocks before left it, waiting before the block; they stay there.
    targets: what the original block gave each of them (batch, seq_len, hidden). epochs: how often each is seen.
    shared: names of parameters that other blocks hold too, which stay as they are.
    """
    block, start = found.block, Refined(rounded, {})
    tuned = _Tuned(found, rounded, shared)
    optimizer = torch.optim.Adam(tuned.factors, lr=_RATE, betas=_BETAS)
    steps = epochs * len(lanes)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    for _ in range(epochs):
        for lane, target in zip(lanes, targets, strict=True):
            with torch.enable_grad():
                loss = _distance(block, tuned.scaled(), lane, target) / target.square().sum()
                if not loss.requires_grad:
                    return None
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    after = tuned.scaled(rounds=True)
    before, now = (
        sum(float(_distance(block, each, lane, target)) for lane, target in zip(lanes, targets, strict=True))
        for each in (start, after)
    )
    return after if now < before else start


class _Tuned:
    """A block with a factor for every scale, and for every element of its vectors."""

    def __init__(self, found: Findings, rounded: Sequence[Rounded], shared: Container[str]) -> None:
        self._found, self._rounded = found, list(rounded)
        self._of_weights = [_ones(each.held.weight.scale) for each in rounded]
        inputs = [each.held.input_scale for each in rounded]
        self._of_inputs = [None if scale is None else _ones(scale) for scale in inputs]
        self._vectors = {
            name: vector.detach().float()
            for name, vector in found.block.named_parameters()
            if vector.dim() == 1 and vector.is_floating_point() and name not in shared
        }
        self._of_vectors = [_ones(vector) for vector in self._vectors.values()]

    @property
    def factors(self) -> list[Tensor]:
        """All that is learned."""
        inputs = [factor for factor in self._of_inputs if factor is not None]
        return [*self._of_weights, *inputs, *self._of_vectors]

    def scaled(self, rounds: bool = False) -> Refined:
        """The block as it is by now, differentiable by the factors. rounds: to what the file holds."""
        factors = zip(self._rounded, self._of_weights, self._of_inputs, strict=True)
        linears = [
            replace(each, held=_scaled(each.held, weight, input, rounds)) for each, weight, input in factors
        ]
        vectors = {
            name: vector * factor
            for (name, vector), factor in zip(self._vectors.items(), self._of_vectors, strict=True)
        }
        if rounds:
            stored = self._found.stored_dtype
            vectors = {name: vector.to(stored(name)).float() for name, vector in vectors.items()}
        return Refined(linears, vectors)


def _ones(like: Tensor) -> Tensor:
    return torch.ones_like(like).requires_grad_()


def _distance(block: nn.Module, refined: Refined, lane: Lane, target: Tensor) -> Tensor:
    """How far the block's output is from what it should be, squared."""
    parameters = _parameters(block, refined.rounded)
    for name, vector in refined.vectors.items():
        parameters[name] = vector.to(block.get_parameter(name).dtype)

    def run(call: Call) -> Tensor:
        with quantizing_inputs(block, refined.rounded):
            output = functional_call(block, parameters, call.args, call.kwargs)
        return (hidden_state(output).float() - target).square().sum()

    return lane.rehearse(run)


def _scaled(held: QuantizedLinear, weight: Tensor, input: Tensor | None, rounds: bool) -> QuantizedLinear:
    """A linear with its scales times factors. rounds: to what they are stored in."""
    scale = held.weight.scale * weight
    if rounds:
        scale = scale.to(held.scale_dtype).float()
    input_scale = held.input_scale
    if input_scale is not None and input is not None:
        input_scale = input_scale * input
    return replace(held, weight=replace(held.weight, scale=scale), input_scale=input_scale)


def _parameters(block: nn.Module, rounded: Sequence[Rounded]) -> dict[str, Tensor]:
    """What the codes of a block's weights stand for, by the names of its parameters; of stacks, all matrices."""
    matrices: dict[str, list[tuple[int, Tensor]]] = {}
    for each in rounded:
        weight, values = each.weight, dequantized_weight(each.held)
        matrices.setdefault(weight.name, []).append(
            (weight.index or 0, values.mT if weight.transposed else values)
        )
    made = {}
    for name, parts in matrices.items():
        like = block.get_parameter(name)
        in_order = [values for _, values in sorted(parts, key=lambda part: part[0])]
        whole = in_order[0] if len(in_order) == 1 else torch.stack(in_order)
        made[name] = whole.reshape(like.shape).to(like.dtype)
    return made
