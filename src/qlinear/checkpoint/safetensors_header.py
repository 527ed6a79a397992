"""Reads the header of a safetensors file: which tensors it holds, and where their bytes are.

Format: 8 bytes with the header's length n; n bytes of JSON; the tensors' data without a gap or an overlap.

Why not the safetensors library: it returns tensors that are views of a memory map. The reader needs the offsets, to
read the bytes into memory that it already has.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

# By a dtype's name in headers: bits per element (BITS), and torch's dtype where there is one (DTYPES).
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The safetensors library's own limit, in bytes.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor: `file[start:stop]`, elements of `dtype_name` in row-major order."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype. Raises CheckpointError for a dtype that torch lacks."""
        if self.dtype_name not in DTYPES:
            raise CheckpointError(f"{self.file} holds a tensor of dtype {self.dtype_name}, which torch lacks")
        return DTYPES[self.dtype_name]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises CheckpointError unless the file is whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise damaged(file, f"its header claims {length:,} bytes of a file of {size:,}")
        header = parse_json(stream.read(length), file)
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _entry(file, name, entry, base) for name, entry in header.items()}
    _require_whole(file, tensors, base, size)
    return tensors


def _entry(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One entry of a header. Raises CheckpointError where its size contradicts its dtype and shape."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        start, stop = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise damaged(file, f"its entry for {name} is malformed") from None
    if dtype not in BITS:
        raise CheckpointError(f"{file} holds {name} of unknown dtype {dtype}: re-save it with safetensors")
    if min((*shape, start)) < 0 or (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
        raise damaged(file, f"{name} of dtype {dtype} and shape {shape} cannot take {stop - start} bytes")
    return TensorInfo(file, dtype, shape, base + start, base + stop)


def _require_whole(file: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """Raise CheckpointError unless the tensors fill the file without a gap or an overlap."""
    end = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise damaged(file, f"{name} starts at byte {info.start:,} where {end:,} was due")
        end = info.stop
    if end > size:
        raise CheckpointError(f"{file} is truncated: {size:,} of {end:,} bytes are there; download it again")
    if end < size:
        raise damaged(file, f"{size - end:,} bytes after its last tensor belong to none")


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError, naming `file`, for anything else and where a key occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_pairs: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique_pairs:
                raise damaged(file, f"the key {key!r} occurs twice in its JSON")
            unique_pairs[key] = value
        return unique_pairs

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(file, f"its JSON cannot be parsed ({error})") from None
    if not isinstance(parsed, dict):
        raise damaged(file, "its JSON is not an object")
    return parsed


def damaged(file: Path, what: str) -> CheckpointError:
    """The error for a file that violates its format."""
    return CheckpointError(f"{file} is damaged: {what}; download it again")
