"""qlinear: quantizes the linear layers of transformer checkpoints, and says what it cost."""

from .errors import QLinearError
from .evaluation import evaluate
from .inplace import quantize_
from .inputs import load
from .inspection import inspect
from .job import quantize
from .relayout import convert
from .scheme import Scheme, TensorFormat

__all__ = [
    "QLinearError",
    "Scheme",
    "TensorFormat",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "quantize_",
]
