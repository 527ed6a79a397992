"""Modules: the quantized linear layer where `torch.nn.Linear` stood, and the norms before it."""

from .norms import QLayerNorm, QRMSNorm, silu_mul_quantize
from .qlinear import QLinear
from .ranges import input_range

__all__ = ["QLayerNorm", "QLinear", "QRMSNorm", "input_range", "silu_mul_quantize"]
