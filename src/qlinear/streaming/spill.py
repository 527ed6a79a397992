"""How much memory the process holds, and hidden states that wait on the disk where it is too much.

Between two blocks a micro-batch holds its hidden state, tokens × hidden_size, and all of a calibration set's together
can be more than a block. The lane that waits holds the tensor in a frame of the model's code, where nobody can replace
it; so its storage is emptied instead, and filled again before the lane goes on.
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
    """A place in the spill's file that one lane's hidden state waits in, `size` bytes at `start`."""

    start: int
    size: int


class Spill:
    """A file without a name in `folder`, gone with the process, that takes tensors while memory is short.

    limit: of resident bytes; beyond it memory is short. file_size: how far the file has grown.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        self.limit, self.file_size = limit, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error

    @property
    def is_short(self) -> bool:
        """Whether the process holds more than it may."""
        return resident() > self.limit

    def put(self, x: Tensor, slot: Slot) -> Slot:
        """Write a CPU tensor's storage to a slot, a new one if that is too small, and empty it."""
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
        """Give an emptied tensor its storage back."""
        x.untyped_storage().resize_(slot.size)
        data, done = _bytes_of(x), 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done : slot.size]], slot.start + done)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"hidden states cannot be put aside on the disk ({error.strerror or error}): mend that and run again, or "
            "give a larger --max-memory"
        )


def _bytes_of(x: Tensor) -> memoryview:
    """All bytes of a CPU tensor's storage, writable; as an array of numpy's it could not be emptied any more."""
    storage = x.untyped_storage()
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
