"""Modules: the quantized linear layer where `torch.nn.Linear` stood, the norms before it, and its training.

`parallel`, which needs torch.distributed, is imported on its own.
"""

from .activation_range import input_range
from .norms import QLayerNorm, QRMSNorm, silu_mul_quantize
from .qat import FakeQuantLinear, convert, fake_quantize, prepare
from .qlinear import QLinear
from .smoothed_linear import SmoothedLinear

__all__ = [
    "FakeQuantLinear",
    "QLayerNorm",
    "QLinear",
    "QRMSNorm",
    "SmoothedLinear",
    "convert",
    "fake_quantize",
    "input_range",
    "prepare",
    "silu_mul_quantize",
]
