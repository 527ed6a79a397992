"""A block that computes as its quantized self will, in float: what the blocks after it are calibrated with.

Weights become the values of their codes, and the inputs of linears are rounded as their scheme says. No module is
replaced, so model code that reads a linear's weight rather than calling it sees the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checkpoint.layouts.base import QuantizedLinear
from ..formats.rounding import choose_qparams, fake_quantize_input
from ..nn.qat import fake_quantize
from .block import QuantizedWeight


@contextmanager
def running_quantized(
    block: nn.Module, quantized: Sequence[QuantizedWeight], refined: Mapping[str, Tensor]
) -> Iterator[None]:
    """Context manager: inputs are rounded. The weights stay rounded afterwards, and the vectors stay refined."""
    for name, vector in refined.items():
        block.get_parameter(name).detach().copy_(vector)
    for weight in quantized:
        _put_values(weight, weight.weight.of(block).detach())
    with quantizing_inputs(block, quantized):
        yield


def dequantized_weight(linear: QuantizedLinear) -> Tensor:
    """The values of a linear's codes, as the weight (out, in) of a linear that does not divide its input."""
    values = linear.weight.dequantize()
    return values if linear.migration_scale is None else values / linear.migration_scale


@contextmanager
def quantizing_inputs(block: nn.Module, quantized: Sequence[QuantizedWeight]) -> Iterator[None]:
    """Context manager: the inputs of linears are rounded. Experts in a stack have no module of their own to hook."""
    hooks = [
        block.get_submodule(weight.weight.module).register_forward_pre_hook(_rounding(weight.linear))
        for weight in quantized
        if weight.weight.index is None and weight.linear.weight.codes.dim() == 2
        if weight.linear.scheme.activation is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _put_values(quantized: QuantizedWeight, parameter: Tensor) -> None:
    """Copy the values of codes into a weight (out, in), or into a stack (experts, out, in) one expert at a time."""
    if parameter.dim() == 2:
        parameter.copy_(dequantized_weight(quantized.linear))
        return
    for expert, codes in zip(parameter, quantized.linear.weight.unstack(), strict=True):
        expert.copy_(codes.dequantize())


def _rounding(linear: QuantizedLinear) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a linear's input x (*, in) as its scheme says, with gradients where they are enabled."""
    activation = linear.scheme.activation
    assert activation is not None

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].float()
        if linear.migration_scale is not None:
            x = x / linear.migration_scale
        x = _rounded(x, linear)
        if linear.migration_scale is not None:
            x = x * linear.migration_scale
        return (x.to(args[0].dtype), *args[1:])

    return hook


def _rounded(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """x (*, in), float32, as the linear sees it."""
    activation = linear.scheme.activation
    assert activation is not None
    scale, zero_point = linear.input_scale, linear.input_zero_point
    if not torch.is_grad_enabled():
        return fake_quantize_input(x, activation, scale, zero_point)
    if scale is None or activation.has_global_scale:
        scale, zero_point = choose_qparams(x.detach(), activation, global_scale=scale)
    return fake_quantize(x, scale, zero_point, activation)
