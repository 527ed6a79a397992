"""Modules: the quantized layer that replaces `torch.nn.Linear`, norms that quantize their output, and training.

`tensor_parallel` is not imported here, because it needs torch.distributed.
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
