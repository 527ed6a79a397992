"""Moves waiting hidden states to the disk while memory is short.

Between two blocks every micro-batch keeps its hidden state, tokens × hidden_size; together they can be larger than a
block. A waiting lane refers to its tensor from a frame of the model's code, so the tensor cannot be replaced. Instead
its storage is emptied, and filled again before the lane continues.
"""

import ctypes
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import OutputError
from ..runtime.memory import resident


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one lane's hidden state in the spill file: `size` bytes at `start`."""

    start: int
    size: int


class Spill:
    """An unnamed temporary file in `folder` for tensors; the system deletes it when the process ends.

    limit: resident bytes above which memory counts as short. file_size: bytes of the file so far.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        self.limit, self.file_size = limit, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error

    @property
    def is_short(self) -> bool:
        """Whether the process uses more memory than the limit."""
        return resident() > self.limit

    def put(self, x: Tensor, slot: Slot) -> Slot:
        """Write a CPU tensor's storage to a slot (a new one if that is too small), and empty the storage."""
        storage = x.untyped_storage()
        size = storage.nbytes()
        if slot.size < size:
            slot = Slot(self.file_size, size)
            self.file_size += size
        data, done = _bytes_of(x), 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], slot.start + done)
        except OSError as error:
            raise self._refused(error) from error
        del data
        storage.resize_(0)
        return Slot(slot.start, size)

    def take(self, x: Tensor, slot: Slot) -> None:
        """Read an emptied tensor's storage back."""
        x.untyped_storage().resize_(slot.size)
        data, done = _bytes_of(x), 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done : slot.size]], slot.start + done)

    def close(self) -> None:
        """Close the file, which deletes it."""
        self._file.close()

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"hidden states cannot be put aside on the disk ({error.strerror or error}): mend that and run again, or "
            "give a larger --max-memory"
        )


def _bytes_of(x: Tensor) -> memoryview:
    """The bytes of a CPU tensor's storage, writable. Not through numpy: that would pin the storage's size."""
    storage = x.untyped_storage()
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
