"""`--plan`: time, memory and disk that a job will take, estimated from its size and from a short trial.

The trial works on the first two blocks as the job would, once with one micro-batch and once with a few, and keeps
nothing. The difference of the two times is that of the micro-batches; the rest is what a block takes whatever the size
of the calibration set.
"""

import os
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..errors import OutputError
from ..pipeline.block import Progress
from ..pipeline.check_weights import require_finite
from ..pipeline.lane_sets import calibration_batches, rows_at_once
from ..pipeline.loop import BlockLoop
from ..pipeline.output.sink import Done, NullJournal, NullSink
from ..pipeline.run import Job, Result
from ..pipeline.select_layers import text_blocks
from ..runtime.memory import peak_rss
from ..streaming.streamed_model import StreamedModel

# Micro-batches of the two trial runs, and blocks of each.
_FEW, _MORE, _BLOCKS = 1, 4, 2
# Memory of a lane relative to its hidden state: masks and rotary tables come on top.
_BESIDE = 1.2
# Bytes that the rate of the disk is measured with.
_WRITTEN = 64 << 20


def estimate(job: Job, out: Path, began: float, progress: Progress, ranks: int = 1) -> Result:
    """What carrying out the order will take: seconds in all, resident bytes at most, and bytes of tensors in `out`.

    began: when it was asked for, monotonic time. ranks: how many will share the calibration set.
    """
    source, plan = job.source, job.plan
    opening = time.monotonic() - began
    start = time.monotonic()
    require_finite(source, progress)
    outside = time.monotonic() - start  # read once to be checked, and once to be copied
    writing = plan.nbytes / _write_rate(out)
    batches = 0
    if job.tokens is not None and job.statistics is None:
        batches = -(-len(calibration_batches(job.tokens)) // ranks)
    few, more = min(batches, _FEW), min(batches, _MORE)
    progress("trying out", 0, 2)
    first, later = _seconds_of_blocks(job, few)
    progress("trying out", 1, 2)
    batch = 0.0
    if more > few:
        batch = max(0.0, (sum(_seconds_of_blocks(job, more)) - first - later) / (_BLOCKS * (more - few)))
    progress("trying out", 2, 2)
    one_time, each = first - later, later + (batches - few) * batch
    seconds = opening + 2 * outside + writing + one_time + each * _blocks_alike(source)
    peak = peak_rss() + (batches - more) * _lane_nbytes(job)
    if job.memory is not None:
        peak = max(peak_rss(), min(peak, job.memory + 2 * source.block_nbytes))
    return Result(
        str(out), seconds, peak, plan.nbytes, source.checkpoint.nbytes, (), plan.notes, planned=True
    )


def _seconds_of_blocks(job: Job, batches: int) -> tuple[float, float]:
    """What the first block and the next take with so many micro-batches; twice the same where there is one block."""
    tokens = job.tokens
    if tokens is not None:
        tokens = tokens[: max(2, batches * rows_at_once(tokens))]
    options = replace(job.options, keep_worst=0)
    loop = BlockLoop(
        job.source, NullSink(), NullJournal(Done()), options, tokens, lambda *_: None, job.statistics
    )
    times = [time.monotonic()]
    with closing(loop.steps()) as steps:
        times += [time.monotonic() for _ in islice(steps, _BLOCKS)]
    return times[1] - times[0], times[-1] - times[-2]


def _blocks_alike(source: StreamedModel) -> float:
    """How many blocks like the last of those tried out the model's blocks make together."""
    sizes = [sum(p.numel() for p in source.blocks[name].parameters()) for name in text_blocks(source)]
    return sum(sizes) / sizes[min(_BLOCKS, len(sizes)) - 1]


def _lane_nbytes(job: Job) -> int:
    """What one micro-batch holds between blocks."""
    if job.tokens is None:
        return 0
    width: int = job.source.model.config.get_text_config().hidden_size
    tokens = rows_at_once(job.tokens) * job.tokens.shape[1]
    # To refine, the original's hidden states wait beside it, and are compared with.
    lanes = 3 if job.options.refine else 1
    return int(_BESIDE * tokens * width * job.source.dtype.itemsize) * lanes


def _write_rate(out: Path) -> float:
    """Bytes per second that the disk of `out` takes. Raises OutputError if it takes none."""
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.monotonic()
            for _ in range(_WRITTEN // len(data)):
                file.write(data)
            os.fsync(file.fileno())
            return _WRITTEN / (time.monotonic() - start)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to ({error.strerror or error}): choose another"
        ) from error
