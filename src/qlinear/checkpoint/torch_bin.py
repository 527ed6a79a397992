"""Reads files that `torch.save` wrote, with weights_only=True: no code of theirs is run.

A pickle is a program for a small stack machine. In a damaged file any instruction may fail, in any way (`UNREADABLE`).
"""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_header import DTYPE_NAMES, TensorInfo, damaged

# What torch.load raises for bytes that are no pickle, or a damaged one.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_pickled(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a torch.save file by name. Their data is stored uncompressed in the file's zip archive.

    The file is loaded in fake-tensor mode: no data is read, and torch records the offsets. Raises CheckpointError.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{file} cannot be read with weights_only=True ({type(error).__name__}): download it again, or re-save it "
            "as safetensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{file} holds no tensors by name: give a file that save_pretrained wrote")
    return {name: _entry(file, name, tensor) for name, tensor in sorted(tensors.items())}


def _entry(file: Path, name: str, tensor: Any) -> TensorInfo:
    offset = (
        getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if isinstance(tensor, Tensor) else None
    )
    if offset is None or not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{file} holds {name} in a form that cannot be streamed: re-save as safetensors"
        )
    start = offset + tensor.storage_offset() * tensor.element_size()
    stop, size = start + tensor.nbytes, file.stat().st_size
    if not 0 <= start <= stop <= size:
        raise damaged(file, f"{name} ends at byte {stop:,} of {size:,}")
    return TensorInfo(file, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), start, stop)
