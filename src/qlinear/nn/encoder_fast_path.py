"""Disables the fused operator of torch's transformer encoders, which would bypass replaced linear layers."""

from torch import nn


def disable_fast_paths(module: nn.Module) -> None:
    """Make torch's encoder layers call their linears if these are no longer nn.Linear.

    In evaluation mode an encoder layer passes its linears' `weight` tensors to one fused operator. This sets the
    attributes that torch checks before it does so.
    """
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer) and _is_replaced(child):
            child.activation_relu_or_gelu = 0
        elif isinstance(child, nn.TransformerEncoder) and any(map(_is_replaced, child.layers)):
            child.use_nested_tensor = False


def _is_replaced(layer: nn.Module) -> bool:
    linears = (getattr(layer, "linear1", None), getattr(layer, "linear2", None))
    return any(linear is not None and type(linear) is not nn.Linear for linear in linears)
