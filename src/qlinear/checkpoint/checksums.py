"""Checks that a finished folder still holds what was written to it.

The writer computes a CRC-32 of each tensor, its dtype and shape included, as it writes. That detects what disks and
transfers do to files, at a fraction of the time of writing. `qlinear.json` stores the checksums of tensors and of
other files. It has none of its own: a damaged one no longer parses, or no longer names all of them.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reader import Checkpoint
from .safetensors_header import damaged, parse_json

# How many damages a message lists.
_LISTED = 3


@dataclass(frozen=True, slots=True)
class Verification:
    """What was verified: a folder, its numbers of tensors and of other files, and total_size, bytes of tensor data."""

    path: str
    tensors: int
    files: int
    total_size: int


def checksum(dtype_name: str, shape: Iterable[int]) -> int:
    """The CRC-32 of a tensor's dtype and shape; continue it with the tensor's bytes."""
    return zlib.crc32(json.dumps([dtype_name, list(shape)]).encode())


def file_checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The CRC-32 of each file, as 8 hexadecimal digits. files: relative to the folder; not weights, as they are read
    whole."""
    return {file: f"{zlib.crc32((folder / file).read_bytes()):08x}" for file in files}


def verify(
    folder: str | Path, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Verification:
    """Compare every tensor and every other file of a finished folder with its checksum.

    Raises CheckpointError naming what is missing, truncated or changed, and for a folder that is unfinished or has no
    checksums. progress: called with (stage, done, total).
    """
    folder = Path(folder)
    expected = _checksums(folder)
    checkpoint = Checkpoint.open(folder)
    damages = [*_files(folder, expected["files"]), *_tensors(checkpoint, expected["tensors"], progress)]
    if damages:
        rest = f" and {len(damages) - _LISTED} more" if len(damages) > _LISTED else ""
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(damages[:_LISTED])}{rest}; copy it again, or make it anew"
        )
    return Verification(str(folder), len(expected["tensors"]), len(expected["files"]), checkpoint.nbytes)


def read_note(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `qlinear.json` says; nothing where another tool made the folder. Raises CheckpointError if it is damaged."""
    file = checkpoint.path / "qlinear.json"
    note = parse_json(file.read_bytes(), file) if file.is_file() else {}
    layers, source = note.get("layers", []), note.get("source", {})
    is_sound = isinstance(layers, list) and all(
        isinstance(x, dict) and isinstance(x.get("name"), str) for x in layers
    )
    if not is_sound or not isinstance(source, dict):
        raise damaged(file, "its `layers` are no list of named objects, or its `source` is no object")
    return note


def _checksums(folder: Path) -> Mapping[str, Mapping[str, str]]:
    note, checksums = folder / "qlinear.json", None
    if (folder / ".qlinear").is_dir():
        raise CheckpointError(
            f"{folder} holds a run that is not finished: run the same command again to go on"
        )
    if note.is_file():
        checksums = parse_json(note.read_bytes(), note).get("checksums")
    if not isinstance(checksums, dict) or not all(
        isinstance(checksums.get(key), dict) for key in ("files", "tensors")
    ):
        raise CheckpointError(
            f"{folder} has no checksums in a qlinear.json to verify it by: only what qlinear wrote has"
        )
    return checksums


def _files(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    for file, before in expected.items():
        if not (folder / file).is_file():
            yield f"{file} is missing"
        elif file_checksums(folder, [file])[file] != before:
            yield f"{file} has changed"


def _tensors(
    checkpoint: Checkpoint, expected: Mapping[str, str], progress: Callable[[str, int, int], Any]
) -> Iterator[str]:
    for i, (name, before) in enumerate(expected.items()):
        progress("verifying", i, len(expected))
        if name not in checkpoint.tensors:
            yield f"{name} is missing"
        elif _checksum_of(checkpoint, name) != before:
            yield f"{name} in {checkpoint.info(name).file.name} has changed"
    yield from (f"{name} was not there" for name in checkpoint.tensors.keys() - expected.keys())
    progress("verifying", len(expected), len(expected))


def _checksum_of(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    crc = checksum(info.dtype_name, info.shape)
    for part in checkpoint.chunks(name):
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
