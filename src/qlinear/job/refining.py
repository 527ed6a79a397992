"""`--refine`: the scales of a block tuned together, until its output is as near to the original's as they can bring it.

Each linear was rounded for its own output. What its block makes of the errors of all of them, and of what the quantized
blocks before it did to the input, only the block's output tells:

    minimise over scales   Σ_tokens |block_Q(x̂) - block(x)|²       by Adam (Kingma & Ba 2014), codes fixed

x̂ is what the quantized blocks before give, x what the original ones gave. It is the objective of BRECQ (Li et al. 2021)
and OmniQuant (Shao et al. 2023), for scales alone: those of weights, and of static inputs. Gradients pass the rounding
of inputs straight through. The best scales are kept only if they are better on the whole set once they are rounded to
what the file holds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..blocks import Call, Lane
from ..checkpoint.layout import QuantizedLinear
from ..structure import Weight
from .recipe import Findings
from .rounding import Rounded
from .simulate import rounding_input

# The first step moves a scale by this share of itself, about one of bfloat16's; later ones by less and less.
_RATE = 4e-3
_BETAS = (0.9, 0.95)


def hidden_of(output: Any) -> Tensor:
    """What a block passes on: its output, or the first of its outputs."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def refine(
    found: Findings, rounded: Sequence[Rounded], lanes: Sequence[Lane], targets: Sequence[Tensor], epochs: int
) -> list[Rounded]:
    """`rounded` with scales that bring the block's output nearest to `targets`, never further away than it was.

    lanes: the calibration set as the quantized blocks before left it, waiting before the block; they stay there.
    targets: what the original block gave each of them (batch, seq_len, hidden). epochs: how often each is seen.
    """
    tuned = _Tuned(found, rounded)
    before = tuned.loss(rounded, lanes, targets)
    steps = epochs * len(lanes)
    optimizer = torch.optim.Adam(tuned.factors, lr=_RATE, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
    )
    for _ in range(epochs):
        for lane, target in zip(lanes, targets, strict=True):
            with torch.enable_grad():
                loss = tuned.distance(tuned.scaled(), lane, target) / target.square().sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    after = tuned.stored()
    return after if tuned.loss(after, lanes, targets) < before else list(rounded)


class _Tuned:
    """The linears of a block, with a factor for every scale that can be tuned."""

    def __init__(self, found: Findings, rounded: Sequence[Rounded]) -> None:
        self._found, self._rounded = found, list(rounded)
        self._of_weights = [torch.ones_like(each.held.weight.scale).requires_grad_() for each in rounded]
        self._of_inputs = [
            None if each.held.input_scale is None else torch.ones_like(each.held.input_scale).requires_grad_()
            for each in rounded
        ]

    @property
    def factors(self) -> list[Tensor]:
        """All that is learned."""
        return [*self._of_weights, *(factor for factor in self._of_inputs if factor is not None)]

    def scaled(self) -> list[Rounded]:
        """The linears with their scales as they are by now, differentiable by the factors."""
        return [
            replace(each, held=_scaled(each.held, weight, input))
            for each, weight, input in zip(self._rounded, self._of_weights, self._of_inputs, strict=True)
        ]

    @torch.no_grad()
    def stored(self) -> list[Rounded]:
        """The same with weight scales as the file will hold them."""
        return [
            replace(each, held=_scaled(each.held, weight.detach(), input and input.detach(), rounds=True))
            for each, weight, input in zip(self._rounded, self._of_weights, self._of_inputs, strict=True)
        ]

    @torch.no_grad()
    def loss(self, rounded: Sequence[Rounded], lanes: Sequence[Lane], targets: Sequence[Tensor]) -> float:
        """The sum of squares over all lanes."""
        return sum(
            float(self.distance(rounded, lane, target)) for lane, target in zip(lanes, targets, strict=True)
        )

    def distance(self, rounded: Sequence[Rounded], lane: Lane, target: Tensor) -> Tensor:
        """How far the block's output is from what it should be, squared."""
        block, held = self._found.block, {each.weight: each.held for each in rounded}
        parameters = _parameters(block, held)

        def run(call: Call) -> Tensor:
            with _rounding_inputs(block, held):
                output = functional_call(block, parameters, call.args, call.kwargs)
            return (hidden_of(output).float() - target).square().sum()

        return lane.rehearse(run)


def _scaled(
    held: QuantizedLinear, weight: Tensor, input: Tensor | None, rounds: bool = False
) -> QuantizedLinear:
    """A linear with its scales times factors. rounds: to what they are stored in."""
    scale = held.weight.scale * weight
    if rounds:
        scale = scale.to(held.scale_dtype).float()
    input_scale = held.input_scale
    if input_scale is not None and input is not None:
        input_scale = input_scale * input
    return replace(held, weight=replace(held.weight, scale=scale), input_scale=input_scale)


def _parameters(block: nn.Module, held: Mapping[Weight, QuantizedLinear]) -> dict[str, Tensor]:
    """What the codes of a block's weights stand for, by the names of its parameters; of stacks, all matrices."""
    matrices: dict[str, list[tuple[int, Tensor]]] = {}
    for weight, linear in held.items():
        values = linear.weight.dequantize()
        if linear.migration_scale is not None:
            values = values / linear.migration_scale
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


@contextmanager
def _rounding_inputs(block: nn.Module, held: Mapping[Weight, QuantizedLinear]) -> Iterator[None]:
    """While open, the inputs of linears pass through the codes of their activations."""
    hooks = [
        block.get_submodule(weight.module).register_forward_pre_hook(rounding_input(linear))
        for weight, linear in held.items()
        if weight.index is None and linear.weight.codes.dim() == 2 and linear.scheme.activation is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
