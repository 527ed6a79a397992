"""What can only be refused by reading or running the model, and that it leaves no trace.

Headers do not tell whether a weight is a number. Those of a block are looked through when they are in memory anyway,
all others, which are copied at the end of a run, before it begins. Where an old result would be deleted, all weights
are read once more than needed, before that.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, StreamedModel, clear
from ..errors import CheckpointError, NumericsError, SourceLostError, StructureError
from ..numerics import count_bad
from ..plan import Plan, is_parameter

if TYPE_CHECKING:
    from .loop import Job

_FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Bytes of a file that are looked through at once: they stay in a core's cache.
_CHUNK = 512 << 10


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


def require_finite(
    source: StreamedModel, progress: Callable[[str, int, int], None], with_blocks: bool
) -> None:
    """Raise NumericsError if a weight of the model, or one outside of its blocks, holds NaN or infinity."""
    inside = () if with_blocks else tuple(f"{name}." for name in source.blocks)
    parameters = [name for name, _ in source.model.named_parameters() if not name.startswith(inside)]
    names = list(dict.fromkeys(s for name in parameters for s in source.names.sources(name)))
    for i, name in enumerate(names):
        progress("checking weights", i, len(names))
        _require_finite(source.checkpoint, name)
    progress("checking weights", len(names), len(names))


@contextmanager
def finding_bad_weights(source: StreamedModel, block: nn.Module, rounded: Container[str]) -> Iterator[None]:
    """Raise NumericsError if a weight of a block that is in memory holds NaN or infinity.

    rounded: the linears whose weights are only rounded inside, which finds it.
    """
    require_finite_block(source, block, rounded)
    try:
        yield
    except NumericsError:
        require_finite_block(source, block)  # which says more: the file, and what to do about it
        raise


def require_finite_block(source: StreamedModel, block: nn.Module, but: Container[str] = ()) -> None:
    """Raise NumericsError if a weight of a block that is in memory, but for some linears', holds NaN or infinity."""
    for name, parameter in block.named_parameters(source.name_of(block)):
        is_left_out = name in but or name.removesuffix(".weight") in but
        if not is_left_out and count_bad(parameter.detach()):
            for tensor in source.names.sources(name):
                _require_finite(source.checkpoint, tensor)


def _require_finite(checkpoint: Checkpoint, name: str) -> None:
    """Raise NumericsError, naming the tensor and counting, if the file holds NaN or infinity in it."""
    bad = sum(count_bad(part) for part in _parts(checkpoint, name))
    if bad:
        info = checkpoint.info(name)
        raise NumericsError(
            f"{name} holds {bad} NaN or infinite of {torch.Size(info.shape).numel()} elements, in {info.file}: "
            "download it again, or mend the model"
        )


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor's elements some at a time, flat, if they are floating point numbers that torch can add up."""
    dtype = checkpoint.info(name).dtype
    if dtype in _FLOAT:
        for part in checkpoint.chunks(name, _CHUNK):
            yield torch.frombuffer(part, dtype=dtype)


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
