"""An order for the job, with all that was asked for checked, and how it is carried out."""

import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.stats_file import CalibrationStats
from ..checkpoint.output_dir import clear
from ..checkpoint.reader import Checkpoint
from ..runtime.distributed import Ranks
from ..runtime.memory import peak_rss
from ..streaming.spill import Spill
from ..streaming.streamed_model import StreamedModel
from .block_state import Layer, Progress, Recipe
from .check_weights import require_finite
from .loop import Job
from .options import quantization_config
from .output.cleanup import leaving_no_trace
from .output.finalize import finish
from .output.journal import begin, discard, identity
from .output.sink import Done, NullJournal, NullSink, Record, Sink
from .select_layers import Plan


@dataclass(frozen=True, slots=True)
class Result:
    """What the job did. out: the folder. total_size: bytes of tensor data in it. warnings: what a user should know.

    planned: whether it is what the job will do, foretold by a dry run.
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
class Order:
    """What is to be done. tokens: the calibration set (n, seq_len), statistics: those of an earlier one; None where
    nothing needs them. memory: bytes that the process may hold before hidden states go to the disk. settings: what was
    asked for and decides the result, as the journal and the model card have it."""

    source: StreamedModel
    plan: Plan
    recipe: Recipe
    tokens: Tensor | None
    statistics: CalibrationStats | None
    memory: int | None
    settings: dict[str, Any]


def carry_out(
    order: Order, out: Path, *, goes_on: bool, overwrite: bool, ranks: Ranks, began: float, progress: Progress
) -> Result:
    """Do the job. goes_on: with what an interrupted run left in `out`. began: when it was asked for, monotonic time."""
    source, existed = order.source, out.is_dir()
    if not goes_on:
        ranks.on_main(lambda: _prepare(source, out, overwrite, progress))
    writer, journal = _begun(order, out, ranks)
    with ExitStack() as stack:
        spill = None
        if order.memory is not None:
            spill = stack.enter_context(closing(Spill(order.memory, out if ranks.is_main else None)))
        job = Job(
            source, writer, journal, order.recipe, order.tokens, progress, order.statistics, ranks, spill
        )
        if ranks.is_main:
            stack.enter_context(leaving_no_trace(job, out, existed))
        job.run()
        ranks.on_main(lambda: _finish(order, job, out))
    journal.remove()
    return ranks.on_main(
        lambda: Result(
            str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
            tuple(job.layers), (*order.plan.notes, *job.warnings),
        )
    )  # fmt: skip


def _prepare(source: StreamedModel, out: Path, overwrite: bool, progress: Progress) -> None:
    require_finite(source, progress, with_blocks=overwrite and out.is_dir())
    discard(out)
    clear(out)


def _begun(order: Order, out: Path, ranks: Ranks) -> tuple[Sink, Record]:
    """What this rank writes to, and what remembers it: for all but the leader, nothing does."""
    mine: tuple[Sink, Record] | None = None
    with ranks.raising_together():
        if ranks.is_main:
            identified = order.settings | identity(order.source, order.tokens)
            mine = begin(out, identified, order.settings["max_shard_size"])
    done = ranks.on_main(lambda: mine[1].done if mine else Done())
    return mine or (NullSink(), NullJournal(done))


def _finish(order: Order, job: Job, out: Path) -> None:
    source, plan = order.source, order.plan
    holders = [layer.name for layer in job.layers if layer.scheme is None and layer.migration == "kept"]
    config = quantization_config(source, order.recipe.layout, plan, job.kept, holders)
    record = {"settings": order.settings, "layers": [asdict(layer) for layer in job.layers]}
    untied = source.head_name in plan.chosen and source.model.config.tie_word_embeddings
    finish(out, source, config, untied, record, job.blocks.writer.checksums)
