"""The output folder: checks that it can be written to, and writes files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

# What `clear` deletes. Other files in the folder stay.
_CHECKPOINT_FILES = (
    *("config.json", "qlinear.json", "README.md", "generation_config.json", "model.safetensors*"),
    *("model-*.safetensors", "pytorch_model*.bin*", ".*.partial"),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template.*",
    ),
)
# A folder with one of these holds a checkpoint, or an unfinished one.
_MARKS = ("config.json", "qlinear.json", ".model-*.partial", ".qlinear")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Context manager: an OSError, such as of a full disk, becomes an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written to ({error.strerror or error}): mend that and run again; "
            "what was finished before stays valid"
        ) from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at any moment, even at a power cut, either the old or the whole new one is there.

    Raises OutputError if it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    with writing_to(path):
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.rename(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: str | Path, nbytes: int) -> None:
    """Raise OutputError unless the disk that will hold `folder` has `nbytes` free."""
    folder = Path(folder).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OutputError(
            f"output folder {folder} needs {nbytes / 1e9:.2f} GB, of which {free / 1e9:.2f} GB are free: "
            "make room or choose another disk"
        )


def require_empty(folder: str | Path, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Raise OutputError unless `folder` is new, empty, or with `overwrite` holds a checkpoint. Deletes nothing.

    source: the checkpoint that is read, which is never overwritten.
    """
    folder = Path(folder)
    if source is not None and folder.resolve() == Path(source).resolve():
        raise OutputError(f"output folder {folder} is the source itself: choose another")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output {folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"output folder {folder} is not empty: choose another, or pass --overwrite")
    if not any(any(folder.glob(mark)) for mark in _MARKS):
        raise OutputError(f"output folder {folder} is not empty and holds no checkpoint: choose another")


def clear(folder: str | Path) -> None:
    """Delete the checkpoint in a folder: its weights, configs and tokenizer files, nothing else."""
    for file in checkpoint_files(Path(folder)):
        file.unlink()


def checkpoint_files(folder: Path) -> list[Path]:
    """The files in a folder that belong to a checkpoint: its weights, configs and tokenizer files."""
    files = {file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)}
    return sorted(file for file in files if file.is_file())
