"""What can only be refused by reading or running the model, and that it leaves no trace.

Headers do not tell whether a weight is a number. So all weights are looked through once, before anything is deleted
or written: that costs one read of the file, which often comes from memory when it is read again, and saves a run that
would end, hours later, in the middle.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, StreamedModel, clear
from ..errors import CheckpointError, NumericsError, StructureError
from ..plan import Plan, is_parameter
from .loop import Job

_FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require_floats(source: StreamedModel, plan: Plan) -> None:
    """Raise CheckpointError if a linear that is to be quantized is stored as codes of some kind."""
    for name in sorted(plan.chosen):
        weight = source.names.sources(name if is_parameter(source, name) else f"{name}.weight")[0]
        info = source.checkpoint.info(weight)
        if info.dtype not in _FLOAT:
            raise CheckpointError(
                f"{info.file} holds {weight} as {info.dtype_name}, which is quantized already: give the float "
                "checkpoint that it was made from"
            )


def require_finite(source: StreamedModel, progress: Callable[[str, int, int], None]) -> None:
    """Raise NumericsError, naming the tensor and counting, if a weight of the model holds NaN or infinity."""
    parameters = dict(source.model.named_parameters())
    names = list(dict.fromkeys(s for name in parameters for s in source.names.sources(name)))
    for i, name in enumerate(names):
        progress("checking weights", i, len(names))
        bad = sum(_count_bad(part) for part in _parts(source.checkpoint, name))
        if bad:
            info = source.checkpoint.info(name)
            raise NumericsError(
                f"{name} holds {bad} NaN or infinite of {torch.Size(info.shape).numel()} elements, in {info.file}: "
                "download it again, or mend the model"
            )
    progress("checking weights", len(names), len(names))


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor's elements a few million at a time, flat, if they are floating point numbers that torch can add up."""
    dtype = checkpoint.info(name).dtype
    if dtype in _FLOAT:
        for part in checkpoint.chunks(name):
            yield torch.frombuffer(part, dtype=dtype)


def _count_bad(x: Tensor) -> int:
    # A sum of finite numbers can overflow, but NaN and infinity always reach it: one cheap pass decides.
    return 0 if bool(x.sum(dtype=torch.float32).isfinite()) else int((~x.isfinite()).sum())


@contextmanager
def leaving_no_trace(job: Job, existed: bool) -> Iterator[None]:
    """Inside, a model that turns out to be unfit takes back what was written of it, and a folder made for it.

    A disk that is full or fails is another matter: what was finished until then stays, to be taken up again.
    """
    try:
        yield
    except (CheckpointError, NumericsError, StructureError):
        job.blocks.writer.close()
        job.journal.remove()
        clear(job.out)
        if not existed:
            _remove_if_empty(job.out)
        raise
    except BaseException:
        job.journal.close()
        raise


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
