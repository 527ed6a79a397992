"""Reads files that `torch.save` wrote, with weights_only=True: no code of theirs is run.

A pickle is a program for a small stack machine. In a damaged file any instruction may fail, in any way (`UNREADABLE`).
"""

import atexit
import os
import pickle
import struct
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_header import DTYPE_NAMES, TensorInfo, damaged, read_header

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
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{file} holds {name} in a form that cannot be read: re-save as safetensors"
            )
    if not all(tensor.is_contiguous() and _offset(tensor) is not None for tensor in tensors.values()):
        return _rewritten(file)
    return {name: _entry(file, name, tensor) for name, tensor in sorted(tensors.items())}


def _offset(tensor: Tensor) -> int | None:
    """Where a tensor's storage begins in its file; None where its format does not say so."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _rewritten(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that cannot be read in place, as a temporary safetensors file that ends with the process.

    A file of torch's format before 1.6, or with tensors that are not contiguous. It is read as a whole.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        descriptor, path = tempfile.mkstemp(suffix=".safetensors")
        os.close(descriptor)
        atexit.register(Path(path).unlink, missing_ok=True)
        save_file(copies, path)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{file} cannot be rewritten to be streamed ({type(error).__name__}): re-save it as safetensors"
        ) from None
    return read_header(Path(path))


def _entry(file: Path, name: str, tensor: Tensor) -> TensorInfo:
    start = (_offset(tensor) or 0) + tensor.storage_offset() * tensor.element_size()
    start, stop, size = int(start), int(start + tensor.nbytes), file.stat().st_size
    if not 0 <= start <= stop <= size:
        raise damaged(file, f"{name} ends at byte {stop:,} of {size:,}")
    return TensorInfo(file, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), start, stop)
