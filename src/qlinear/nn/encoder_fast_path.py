"""Torch's transformer encoders, kept from passing by what took the place of their linear layers."""

from torch import nn


def leave_fast_paths(module: nn.Module) -> None:
    """Let torch's encoder layers call their linears where those are no longer nn.Linear.

    In evaluation they would hand the weights themselves, codes or floats to be rounded, to one fused operator. What is
    set here are the attributes by which they decide.
    """
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer) and _is_replaced(child):
            child.activation_relu_or_gelu = 0
        elif isinstance(child, nn.TransformerEncoder) and any(map(_is_replaced, child.layers)):
            child.use_nested_tensor = False


def _is_replaced(layer: nn.Module) -> bool:
    own = (getattr(layer, "linear1", None), getattr(layer, "linear2", None))
    return any(linear is not None and type(linear) is not nn.Linear for linear in own)
