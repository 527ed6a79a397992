"""A block that computes as its quantized self will, in float: what the blocks after it are calibrated with.

Weights become what their codes stand for, and the inputs of linears pass through the codes of their activations. No
module is replaced, so code that reads a linear's weight rather than calling it sees the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layouts.base import QuantizedLinear
from ..formats.rounding import QuantizedTensor, choose_qparams, fake_quantize_input
from ..nn.qat import fake_quantize
from .block_state import Findings
from .quantize_groups import Rounded


@contextmanager
def running_quantized(found: Findings, rounded: Sequence[Rounded]) -> Iterator[None]:
    """While open, inputs are rounded; the weights of the block stay rounded, and its vectors refined, for good."""
    for name, vector in found.refined.items():
        found.block.get_parameter(name).detach().copy_(vector)
    for each in rounded:
        matrix = each.weight.of(found.block).detach()
        if matrix.dim() > 2:
            _copy_experts(each.held.weight, matrix)
        else:
            matrix.copy_(dequantized_weight(each.held))
    with quantizing_inputs(found.block, rounded):
        yield


def dequantized_weight(held: QuantizedLinear) -> Tensor:
    """What a linear's codes stand for, as the weight (out, in) of one that does not divide its input."""
    floats = held.weight.dequantize()
    return floats if held.migration_scale is None else floats / held.migration_scale


@contextmanager
def quantizing_inputs(block: nn.Module, rounded: Sequence[Rounded]) -> Iterator[None]:
    """While open, the inputs of linears pass through the codes of their activations; those of experts do not, since no
    module stands before each."""
    hooks = [
        block.get_submodule(each.weight.module).register_forward_pre_hook(_rounding_input(each.held))
        for each in rounded
        if each.weight.index is None and each.held.weight.codes.dim() == 2
        if each.held.scheme.activation is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copy_experts(weight: QuantizedTensor, stack: Tensor) -> None:
    """Experts (experts, out, in), one at a time."""
    for expert, quantized in zip(stack, weight.unstack(), strict=True):
        expert.copy_(quantized.dequantize())


def _rounding_input(held: QuantizedLinear) -> Any:
    """A hook that replaces a linear's input x (*, in) by what its codes stand for, with gradients where enabled."""
    activation = held.scheme.activation
    assert activation is not None

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].float()
        if held.migration_scale is not None:
            x = x / held.migration_scale
        scale, zero_point = held.input_scale, held.input_zero_point
        if torch.is_grad_enabled():
            if scale is None:
                scale, zero_point = choose_qparams(x.detach(), activation)
            x = fake_quantize(x, scale, zero_point, activation)
        else:
            x = fake_quantize_input(x, activation, scale, zero_point)
        if held.migration_scale is not None:
            x = x * held.migration_scale
        return (x.to(args[0].dtype), *args[1:])

    return rounded
