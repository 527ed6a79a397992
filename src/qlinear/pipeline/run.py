"""The whole job: prepare the output folder, run the loop over the blocks, and make the shards a checkpoint."""

import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..calibration.stats_file import CalibrationStats
from ..checkpoint.output_dir import clear
from ..checkpoint.reader import Checkpoint
from ..checkpoint.replace_dir import STAGING_SUFFIX, holds_checkpoint, staging_dir, swap
from ..runtime.distributed import Ranks
from ..runtime.memory import peak_rss
from ..streaming.spill import Spill
from ..streaming.streamed_model import StreamedModel
from .block import Layer, Progress
from .check_weights import require_finite
from .loop import BlockLoop
from .options import Options, quantization_config
from .output.block_writer import BlockWriter
from .output.cleanup import leaving_no_trace
from .output.finalize import finish
from .output.journal import begin, discard, identity, is_unfinished
from .output.sink import Done, NullJournal, NullSink, Record, Sink
from .select_layers import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """What the job did. out: the folder. total_size: bytes of tensor data in it. warnings: what a user should know.

    planned: whether these are the estimates of a dry run.
    """

    out: str
    seconds: float
    peak_rss_bytes: int
    total_size: int
    source_size: int
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    planned: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """All that a job works on.

    tokens: the calibration set (n, seq_len); statistics: of an earlier calibration; None where nothing needs them.
    memory: resident bytes beyond which hidden states wait on the disk.
    """

    source: StreamedModel
    plan: Plan
    options: Options
    tokens: Tensor | None
    statistics: CalibrationStats | None
    memory: int | None


def run(
    job: Job, out: Path, target: Path, *, resumes: bool, ranks: Ranks, began: float, progress: Progress
) -> Result:
    """Do a job. target: the folder that is written, `out` itself or, where `out` holds a checkpoint, one beside it.

    resumes: whether an interrupted run in `target` is continued. began: monotonic time of the request.
    """
    source, existed = job.source, target.is_dir()
    if not resumes:
        ranks.on_main(lambda: _prepare(source, target, progress))
    sink, journal = _begin(job, target, ranks)
    with ExitStack() as stack:
        spill = None
        if job.memory is not None:
            spill = stack.enter_context(closing(Spill(job.memory, target if ranks.is_main else None)))
        if ranks.is_main:
            stack.enter_context(leaving_no_trace(sink, journal, target, existed))
        loop = BlockLoop(
            source, sink, journal, job.options, job.tokens, progress, job.statistics, ranks, spill
        )
        loop.run()
        ranks.on_main(lambda: _finish(job, loop.writer, target))
    ranks.on_main(lambda: _hand_over(journal, target, out))
    journal.remove()
    return ranks.on_main(
        lambda: Result(
            str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
            tuple(loop.layers), (*job.plan.notes, *loop.warnings),
        )
    )  # fmt: skip


def target_of(out: Path, overwrite: bool) -> Path:
    """The folder to write: `out`, or one beside it where a finished checkpoint there is to be replaced."""
    return staging_dir(out) if overwrite and holds_checkpoint(out) and not is_unfinished(out) else out


def _prepare(source: StreamedModel, target: Path, progress: Progress) -> None:
    require_finite(source, progress)
    discard(target)
    if target.name.endswith(STAGING_SUFFIX):  # what an interrupted swap left of an old checkpoint
        shutil.rmtree(target, ignore_errors=True)
    clear(target)


def _hand_over(journal: Record, target: Path, out: Path) -> None:
    """Put a new checkpoint that was made beside an old one in its place."""
    if target != out:
        swap(target, out)
        journal.moved(out)


def _begin(job: Job, out: Path, ranks: Ranks) -> tuple[Sink, Record]:
    """Where this rank's results and its journal go: nowhere, but for the main rank."""
    mine: tuple[Sink, Record] | None = None
    with ranks.raising_together():
        if ranks.is_main:
            settings = job.options.settings() | identity(job.source, job.tokens)
            mine = begin(out, settings, job.options.max_shard_size)
    done = ranks.on_main(lambda: mine[1].done if mine else Done())
    return mine or (NullSink(), NullJournal(done))


def _finish(job: Job, writer: BlockWriter, out: Path) -> None:
    """Make the folder of shards a checkpoint."""
    source, plan = job.source, job.plan
    holders = [layer.name for layer in writer.layers if layer.scheme is None and layer.migration == "kept"]
    config = quantization_config(source, job.options.layout, plan, writer.kept, holders)
    record = {"settings": job.options.settings(), "layers": [asdict(layer) for layer in writer.layers]}
    untied = source.head_name in plan.chosen and source.model.config.tie_word_embeddings
    finish(out, source, config, untied, record, writer.sink.checksums)
