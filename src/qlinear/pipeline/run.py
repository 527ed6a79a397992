"""The whole job: prepare the output folder, run the loop over the blocks, and make the shards a checkpoint."""

import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..calibration.stats_file import CalibrationStats
from ..checkpoint.output_dir import clear
from ..checkpoint.reader import Checkpoint
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
from .output.journal import begin, discard, identity
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
    job: Job, out: Path, *, resumes: bool, overwrite: bool, ranks: Ranks, began: float, progress: Progress
) -> Result:
    """Do a job. resumes: whether an interrupted run in `out` is continued. began: monotonic time of the request."""
    source, existed = job.source, out.is_dir()
    if not resumes:
        ranks.on_main(lambda: _prepare(source, out, overwrite, progress))
    sink, journal = _begin(job, out, ranks)
    with ExitStack() as stack:
        spill = None
        if job.memory is not None:
            spill = stack.enter_context(closing(Spill(job.memory, out if ranks.is_main else None)))
        if ranks.is_main:
            stack.enter_context(leaving_no_trace(sink, journal, out, existed))
        loop = BlockLoop(
            source, sink, journal, job.options, job.tokens, progress, job.statistics, ranks, spill
        )
        loop.run()
        ranks.on_main(lambda: _finish(job, loop.writer, out))
    journal.remove()
    return ranks.on_main(
        lambda: Result(
            str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
            tuple(loop.layers), (*job.plan.notes, *loop.warnings),
        )
    )  # fmt: skip


def _prepare(source: StreamedModel, out: Path, overwrite: bool, progress: Progress) -> None:
    require_finite(source, progress, with_blocks=overwrite and out.is_dir())
    discard(out)
    clear(out)


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
