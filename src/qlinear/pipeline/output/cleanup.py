"""What can only be refused by reading or running the model, and that it leaves no trace.

Headers do not tell whether a weight is a number. Those of a block are looked through when they are in memory anyway,
all others, which are copied at the end of a run, before it begins. Where an old result would be deleted, all weights
are read once more than needed, before that.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...checkpoint.output_dir import clear
from ...errors import CheckpointError, NumericsError, SourceLostError, StructureError
from .sink import Record, Sink


@contextmanager
def leaving_no_trace(sink: Sink, journal: Record, out: Path, existed: bool) -> Iterator[None]:
    """Context manager: a model that turns out to be unfit leaves nothing behind, not even a folder that was made.

    Where the disk is full or the source cannot be read, finished blocks stay, for another run to resume.
    """
    try:
        yield
    except SourceLostError:
        _release(sink, journal)
        raise
    except (CheckpointError, NumericsError, StructureError):
        sink.close()
        journal.remove()
        clear(out)
        if not existed:
            _remove_if_empty(out)
        raise
    except BaseException:
        _release(sink, journal)
        raise


def _release(sink: Sink, journal: Record) -> None:
    """Leave the folder as it is, for another run to resume."""
    with suppress(OSError):  # a shard that was closed, or could not be
        sink.close()
    journal.close()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
