"""Checkpoints: reading tensors one at a time, writing shards as they come, one file per on-disk layout."""

from .conversion import NameMap
from .header import TensorInfo
from .output import clear, require_empty, require_space, write_atomically
from .reader import Checkpoint
from .skeleton import load_config, skeleton
from .streamed import StreamedModel
from .verification import Verification, verify
from .writer import ShardWriter

__all__ = [
    "Checkpoint",
    "NameMap",
    "ShardWriter",
    "StreamedModel",
    "TensorInfo",
    "Verification",
    "clear",
    "load_config",
    "require_empty",
    "require_space",
    "skeleton",
    "verify",
    "write_atomically",
]
