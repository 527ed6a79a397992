"""Tells the linears that compute x Wᵀ + b and nothing else from subclasses of `nn.Linear` that do more.

Only the former can be replaced by a quantized linear. DeepSeek V4's grouped projection and Llama 4's router are
subclasses whose forward does more; Falcon's linear has a forward of its own that computes the same. So a forward that
is not `nn.Linear`'s is run on random numbers and compared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import SmoothedLinear
from .random_weights import random_weights

# What the forward of another class may raise for an input that it does not expect.
_FORWARD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module, its parameters perhaps on meta, is an `nn.Linear` that a quantized one can replace."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or isinstance(module, SmoothedLinear) or _agrees(module)


def _agrees(module: nn.Linear) -> bool:
    with torch.no_grad(), random_weights([module], _random):
        # As many dimensions as hidden states have; a multiple of the machine epsilon as its sums may differ in order.
        x = torch.randn(1, 3, module.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(module.weight.dtype)
        try:
            output = module(x)
            expected = F.linear(x.to(module.weight.device), module.weight, module.bias)
        except _FORWARD_ERRORS:
            return False
        tolerance = module.in_features * torch.finfo(expected.dtype).eps
        same_kind = isinstance(output, Tensor) and output.shape == expected.shape
        return same_kind and torch.allclose(output.float(), expected.float(), tolerance, tolerance)


def _random(module: nn.Module, parameter: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (*parameter.shape[:-1], 1) if parameter.dim() > 1 else parameter.shape
    column = torch.randn(size, generator=generator)
    # Expanded along `in`, so it takes no memory; the input is random, so that no two channels are alike.
    return column.to(parameter.dtype).expand(parameter.shape)
