"""Modules: the quantized linear layer where `torch.nn.Linear` stood."""

from .qlinear import QLinear

__all__ = ["QLinear"]
