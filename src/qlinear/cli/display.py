"""What a person sees: bars on stderr while work goes on, tables on stdout when it is done."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..evaluation import Evaluation
from ..inspection import Inspection
from ..job import Result

_WORST = 10
_LINE_EVERY = 5.0


class Bars:
    """One bar per stage, with rate and time left; plain lines where stderr is no terminal; nothing if quiet."""

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._lines = not console.is_terminal and not quiet
        self._said: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(True),
        )
        self._progress = Progress(*columns, console=console, disable=quiet or self._lines)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        if self._lines:
            self._say(stage, done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)

    def _say(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in self._said or done == total or now - self._said[stage] > _LINE_EVERY:
            self._said[stage] = now
            print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)


def show_result(result: Result) -> None:
    """The summary of a job: what it made, from how much, and which layers it hurt most."""
    console = Console()
    folded = sum(layer.migration == "folded" for layer in result.layers)
    summary = _table("", "", title=f"[bold]{result.out}[/bold]")
    summary.add_row("linears quantized", f"{len(result.layers)}  ({folded} smoothed)")
    share = result.total_size / result.source_size
    summary.add_row("size", f"{_size(result.source_size)} → {_size(result.total_size)}  ({share:.0%})")
    summary.add_row("time", f"{result.seconds:.1f} s")
    summary.add_row("peak memory", _size(result.peak_rss_bytes))
    console.print(summary)
    worst = _table("layer", "output error", "smoothing", title=f"the {_WORST} that lost most")
    for layer in sorted(result.layers, key=lambda layer: -layer.error)[:_WORST]:
        where = f"folded into {layer.folded_into}" if layer.folded_into else layer.migration
        worst.add_row(layer.name, f"{layer.error:.2%}", where)
    console.print(worst)
    for warning in result.warnings:
        console.print(f"[yellow]note:[/yellow] {warning}")


def show_evaluation(evaluation: Evaluation) -> None:
    """What quantization cost, beside the reference."""
    table = _table("", "model", "reference")
    reference = evaluation.reference_perplexity
    table.add_row(
        "perplexity", f"{evaluation.perplexity:.4f}", "" if reference is None else f"{reference:.4f}"
    )
    if evaluation.kl is not None and evaluation.kl_p99 is not None and evaluation.top1_agreement is not None:
        table.add_row("KL divergence, mean", f"{evaluation.kl:.6f}", "")
        table.add_row("KL divergence, 99th percentile", f"{evaluation.kl_p99:.6f}", "")
        table.add_row("same most likely token", f"{evaluation.top1_agreement:.2%}", "")
    table.add_row("tokens", f"{evaluation.tokens}", "")
    Console().print(table)


def show_inspection(inspection: Inspection) -> None:
    """Every linear, and the totals."""
    console = Console()
    table = _table("linear", "shape", "scheme", "scales", "before", "after", "smoothing")
    for linear in inspection.linears:
        where = f"folded into {linear.folded_into}" if linear.folded_into else linear.migration
        table.add_row(
            linear.name, "×".join(map(str, linear.shape)), linear.scheme or "float",
            "×".join(map(str, linear.scale_shape)), _size(linear.bytes_before), _size(linear.bytes_after), where,
        )  # fmt: skip
    console.print(table)
    before, after = inspection.total_size_before, inspection.total_size
    console.print(f"all tensors: {before:,} → {after:,} bytes ({after / before:.0%})")


def _table(*headers: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headers))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    return table


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
