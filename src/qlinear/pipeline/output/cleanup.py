"""What can only be refused by reading or running the model, and that it leaves no trace.

Headers do not tell whether a weight is a number. Those of a block are looked through when they are in memory anyway,
all others, which are copied at the end of a run, before it begins. Where an old result would be deleted, all weights
are read once more than needed, before that.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.output_dir import clear
from ...errors import CheckpointError, NumericsError, SourceLostError, StructureError

if TYPE_CHECKING:
    from ..loop import Job


@contextmanager
def leaving_no_trace(job: "Job", out: Path, existed: bool) -> Iterator[None]:
    """Inside, a model that turns out to be unfit takes back what was written of it, and a folder made for it.

    A disk that is full or cannot be read is another matter: what was finished until then stays, to be taken up again.
    """
    try:
        yield
    except SourceLostError:
        _let_go(job)
        raise
    except (CheckpointError, NumericsError, StructureError):
        job.blocks.writer.close()
        job.journal.remove()
        clear(out)
        if not existed:
            _remove_if_empty(out)
        raise
    except BaseException:
        _let_go(job)
        raise


def _let_go(job: "Job") -> None:
    """Leave the folder as it is, for another run to take up."""
    with suppress(OSError):  # a shard that was closed, or could not be
        job.blocks.writer.close()
    job.journal.close()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
