"""What a person sees: bars on stderr while work goes on, tables on stdout when it is done."""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby, takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..api.calibrate import Calibration
    from ..api.evaluate import Evaluation
    from ..api.inspect import Inspection
    from ..checkpoint.checksums import Verification
    from ..pipeline.run import Result

# How many of the layers that lost most are shown.
_WORST = 10
# Seconds between two lines of one stage, where stderr is no terminal.
_LINE_EVERY = 5.0
# Least width of a table's last column, in characters, however narrow the terminal is.
_LEAST = 12


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step where they are slow."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class Bars:
    """Progress on stderr: one bar per stage with rate and time left; plain lines where that is no terminal.

    quiet: show nothing. Context manager: the bars are on the screen until it ends.
    """

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._lines = not console.is_terminal and not quiet
        # When a stage last printed a line, monotonic time.
        self._said: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True),
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


def show(value: Any, as_json: bool, as_table: Callable[[Any], None]) -> None:
    """Print a report: one JSON object for machines, or the table for people."""
    if as_json:
        print(json.dumps(asdict(value)))
    else:
        as_table(value)


def show_result(result: "Result") -> None:
    """The summary of a job: sizes, time and memory, and the layers that lost most. A plan says "about"."""
    quantized = sum(layer.scheme is not None for layer in result.layers)
    smoothed = sum(layer.migration != "none" for layer in result.layers)
    summary = _table("", "", title=f"[bold]{escape(result.out)}[/bold]")
    if not result.planned:
        summary.add_row("linears quantized", f"{quantized}  ({smoothed} smoothed)")
    share = result.total_size / result.source_size
    summary.add_row("size", f"{_size(result.source_size)} → {_size(result.total_size)}  ({share:.0%})")
    about = "about " if result.planned else ""
    summary.add_row("time", f"{about}{result.seconds:.1f} s")
    summary.add_row("peak memory", about + _size(result.peak_rss_bytes))
    _print(summary)
    worst = sorted(result.layers, key=lambda layer: -layer.error)[:_WORST]
    if worst:
        is_searched = any(layer.error != layer.rtn_error for layer in worst)
        nearest = ("to nearest",) if is_searched else ()
        title = f"the {len(worst)} that lost most"
        table = _table("layer", "output error", *nearest, "share", "smoothed by", title=title)
        for layer in worst:
            figures = [f"{layer.error:.2%}", *([f"{layer.rtn_error:.2%}"] if is_searched else [])]
            where = _home(layer.name, layer.migration, layer.folded_into)
            alpha = "" if layer.alpha is None or not layer.curve else f", α {layer.alpha:g}"
            table.add_row(escape(layer.name), *figures, f"{layer.share:.0%}", where + alpha)
        _print(table)
    for warning in result.warnings:
        Console().print(f"[yellow]note:[/yellow] {escape(warning)}", highlight=False)


def show_calibration(calibration: "Calibration") -> None:
    """How much was measured, and the experts that no token reached."""
    table = _table("", "", title=f"[bold]{escape(calibration.out)}[/bold]")
    table.add_row("inputs measured", f"{len(calibration.modules)}")
    table.add_row("tokens", f"{calibration.tokens}")
    table.add_row("time", f"{calibration.seconds:.1f} s")
    _print(table)
    if calibration.idle:
        names = escape(", ".join(calibration.idle))
        Console().print(
            f"[yellow]note:[/yellow] no token reached {names}: calibrate on more text", highlight=False
        )


def show_evaluation(evaluation: "Evaluation") -> None:
    """Perplexity, and how far the model is from the reference where there is one."""
    table = _table("", "model", "reference")
    reference = evaluation.reference_perplexity
    table.add_row(
        "perplexity", f"{evaluation.perplexity:.4f}", "" if reference is None else f"{reference:.4f}"
    )
    if evaluation.kl is not None and evaluation.kl_p99 is not None and evaluation.top1_agreement is not None:
        table.add_row("KL divergence, mean", f"{evaluation.kl:.6f}", "")
        if evaluation.kl_error is not None:
            table.add_row("KL divergence, standard error", f"{evaluation.kl_error:.6f}", "")
        table.add_row("KL divergence, 99th percentile", f"{evaluation.kl_p99:.6f}", "")
        table.add_row("same most likely token", f"{evaluation.top1_agreement:.2%}", "")
    table.add_row("tokens", f"{evaluation.tokens}", "")
    table.add_row("computed in", evaluation.dtype, "")
    _print(table)


def show_inspection(inspection: "Inspection") -> None:
    """Every linear, under the name of its block; then the totals."""
    table = _table("linear", "shape", "scheme", "scales", "before", "after", "smoothing")
    for block, linears in groupby(inspection.linears, lambda linear: _block(linear.name)):
        if block:
            table.add_row(f"[bold]{escape(block)}[/bold]")
        for linear in linears:
            name = linear.name.removeprefix(f"{block}.")
            table.add_row(
                f"  {escape(name)}" if block else f"[bold]{escape(name)}[/bold]", _shape(linear.shape),
                linear.scheme or "float", _shape(linear.scale_shape), _size(linear.bytes_before),
                _size(linear.bytes_after), _home(f"{block}.", linear.migration, linear.folded_into),
            )  # fmt: skip
    _print(table)
    before, after = inspection.total_size_before, inspection.total_size
    Console().print(f"all tensors: {before:,} → {after:,} bytes ({after / before:.0%})", highlight=False)


def show_verification(verification: "Verification") -> None:
    """One line: the folder is as it was written, and how much was compared."""
    compared = f"{verification.tensors} tensors ({_size(verification.total_size)}) and {verification.files} other files"
    Console().print(f"{escape(verification.path)} is as it was written: {compared}", highlight=False)


def _block(name: str) -> str:
    """The block of a linear: its name up to the first number. Empty where the name has none."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


def _home(name: str, migration: str, folded_into: str | None) -> str:
    """Where a layer's smoothing lives. A module that took it is named relative to the layer."""
    if folded_into is None:
        return migration
    pairs = takewhile(
        lambda pair: pair[0] == pair[1], zip(name.split("."), folded_into.split("."), strict=False)
    )
    return escape(".".join(folded_into.split(".")[len(list(pairs)) :]))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _table(*headers: str, title: str | None = None) -> Table:
    """A table that cuts no text: on a narrow terminal its last column wraps, and no other does."""
    table = Table(
        title=title,
        title_justify="left",
        show_header=any(headers),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, header in enumerate(headers):
        is_last = i == len(headers) - 1
        table.add_column(
            header,
            justify="right" if 0 < i < len(headers) - 1 else "left",
            no_wrap=not is_last,
            overflow="fold",
        )
    return table


def _print(table: Table) -> None:
    """Print a table at the terminal's width, or wider where that would cut a name. Terminals wrap long lines."""
    console = Console()
    unfolded = Measurement.get(console, console.options.update(max_width=10**4), table).minimum
    last = max(console.measure(cell).minimum for cell in table.columns[-1].cells)
    console.width = max(console.width, unfolded - max(0, last - _LEAST))
    console.print(table)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 1000 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes} B"
