"""Whether a finished folder still holds what was written to it.

While tensors are written their CRC-32 is taken, in passing: it finds what disks and transfers do to files, and costs
a fraction of writing them. It covers dtype and shape too. `qlinear.json` keeps the checksums, those of the other files
included; itself it is covered by being JSON that names all of them.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reader import Checkpoint
from .safetensors_header import parse_json

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared and found to be as it was written. total_size: bytes of tensor data."""

    path: str
    tensors: int
    files: int
    total_size: int


def checksum(dtype_name: str, shape: Iterable[int]) -> int:
    """The CRC-32 to go on from with a tensor's bytes."""
    return zlib.crc32(json.dumps([dtype_name, list(shape)]).encode())


def file_checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Of whole files that are not weights."""
    return {file: f"{zlib.crc32((folder / file).read_bytes()):08x}" for file in files}


def verify(
    folder: str | Path, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Verification:
    """Compare every tensor and every other file of a finished folder with what was written.

    Raises CheckpointError, in one line, naming what is missing, truncated or changed, and for a folder that is not
    finished or has no checksums.
    """
    folder = Path(folder)
    expected = _checksums(folder)
    checkpoint = Checkpoint.open(folder)
    damages = [*_files(folder, expected["files"]), *_tensors(checkpoint, expected["tensors"], progress)]
    if damages:
        rest = f" and {len(damages) - _NAMED} more" if len(damages) > _NAMED else ""
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(damages[:_NAMED])}{rest}; copy it again, or make it anew"
        )
    return Verification(str(folder), len(expected["tensors"]), len(expected["files"]), checkpoint.nbytes)


def _checksums(folder: Path) -> Mapping[str, Mapping[str, str]]:
    note, found = folder / "qlinear.json", None
    if (folder / ".qlinear").is_dir():
        raise CheckpointError(
            f"{folder} holds a run that is not finished: run the same command again to go on"
        )
    if note.is_file():
        found = parse_json(note.read_bytes(), note).get("checksums")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), dict) for key in ("files", "tensors")
    ):
        raise CheckpointError(
            f"{folder} has no checksums in a qlinear.json to verify it by: only what qlinear wrote has"
        )
    return found


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
        elif _sum_of(checkpoint, name) != before:
            yield f"{name} in {checkpoint.info(name).file.name} has changed"
    yield from (f"{name} was not there" for name in checkpoint.tensors.keys() - expected.keys())
    progress("verifying", len(expected), len(expected))


def _sum_of(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    found = checksum(info.dtype_name, info.shape)
    for part in checkpoint.chunks(name):
        found = zlib.crc32(part, found)
    return f"{found:08x}"
