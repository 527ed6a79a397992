"""qlinear: quantizes the linear layers of transformer checkpoints, and says what it cost."""

from .errors import QLinearError
from .scheme import Scheme, TensorFormat

__all__ = ["QLinearError", "Scheme", "TensorFormat"]
