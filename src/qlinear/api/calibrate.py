"""`qlinear calibrate`: the statistics of a model's inputs alone, one decoder block in memory at a time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.collect import calibrate
from ..calibration.stats import InputStats
from ..calibration.stats_file import CalibrationStats, combine, input_name, require_writable, save_statistics
from ..data import Source
from ..runtime.device import CPU, as_device, moved
from ..runtime.distributed import Ranks
from ..streaming.lanes import Lane, batches_of
from ..streaming.open_model import calibration_ids, open_model
from ..streaming.streamed_model import StreamedModel
from ..tracing.proof import run_in_float32
from ..tracing.trace import Weight
from .evaluate import Progress

# Tokens of the trace, which shows which weights multiply what; and tokens that pass through a block at once.
_TRACED, _BATCH_TOKENS = (2, 16), 2048
_ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of `write_statistics`.

    out: the file. tokens: of the calibration set. modules: names of the weights whose inputs were measured. idle: names
    of the weights that no token reached, such as experts of a mixture.
    """

    out: str
    seconds: float
    tokens: int
    modules: tuple[str, ...]
    idle: tuple[str, ...]


def write_statistics(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Source = "demo",
    samples: int = 128,
    seq_len: int = 512,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = CPU,
    seed: int = 0,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Pass a calibration set through a model, and write the statistics of every weight's input to a file.

    out: `.safetensors`, or `.pth` for LMDeploy's form. The other arguments are those of `qlinear.quantize`.
    Raises QLinearError, before any work, for whatever cannot be done; nothing is written then.
    """
    began, ranks = time.monotonic(), Ranks.present()
    with ranks.raising_together():
        if ranks.is_main:
            require_writable(out, overwrite)
        where = as_device(device)
        source = open_model(model, dtype, trust_remote_code, revision, where)
        source.checkpoint.require_unquantized()
        tokens = calibration_ids(calibration, source, samples, seq_len, seed)
    statistics = gather_statistics(source, tokens, progress, replace(ranks, device=where))
    ranks.on_main(lambda: save_statistics(out, statistics))
    return Calibration(
        str(out),
        time.monotonic() - began,
        tokens.numel(),
        tuple(statistics.inputs),
        tuple(sorted(statistics.idle)),
    )


@torch.no_grad()
def gather_statistics(
    source: StreamedModel,
    tokens: Tensor,
    progress: Progress = lambda stage, done, total: None,
    ranks: Ranks = _ALONE,
) -> CalibrationStats:
    """The statistics of every weight's input in the model's blocks, over token ids (n, seq_len), split over `ranks`."""
    inputs: dict[str, InputStats] = {}
    idle: set[str] = set()
    rows = max(1, _BATCH_TOKENS // tokens.shape[1])
    traced = tokens[: _TRACED[0], : _TRACED[1]]
    batches = [*batches_of(traced, len(traced)), *ranks.shard(batches_of(tokens, rows))]
    with source.lanes(batches) as lanes:
        while (block := lanes.at) is not None and block is not source.head:
            progress("calibrating", source.position(block), len(source.blocks))
            with source.loaded(block):
                stats, unseen = _of_block(block, source.name_of(block), ranks, *lanes)
            _add(inputs, stats)
            idle |= unseen
    progress("calibrating", len(source.blocks), len(source.blocks))
    return CalibrationStats(inputs, frozenset(idle - set(inputs)), source.checkpoint.fingerprint())


def _of_block(
    block: nn.Module, name: str, ranks: Ranks, traced: Lane, *calibration: Lane
) -> tuple[dict[str, InputStats], set[str]]:
    """The statistics of a block's weights by name, and the names of those that no token reached."""
    trace = run_in_float32(block, traced.waiting)
    stats = calibrate(block, calibration, trace, name, ranks=ranks)
    traced.step()
    multiplied = {weight for product in trace.products for weight in _slices(block, product.weight)}
    linears = {Weight(f"{n}.weight") for n, module in block.named_modules() if isinstance(module, nn.Linear)}
    in_order = dict.fromkeys([*(product.weight for product in trace.products), *stats])
    stats = {weight: stats[weight] for weight in in_order if weight in stats}
    return _named(stats, name), {input_name(name, weight) for weight in (multiplied | linears) - set(stats)}


def _slices(block: nn.Module, weight: Weight) -> list[Weight]:
    """The weight itself, or all matrices of its stack."""
    if weight.index is None:
        return [weight]
    return [replace(weight, index=index) for index in range(weight.count(block))]


def _named(stats: Mapping[Weight, InputStats], block: str) -> dict[str, InputStats]:
    """Statistics by the names that a file gives them, on the CPU and without samples; shared ones stay shared."""
    bare = {
        id(one): moved(replace(one, sample=one.sample.new_empty(0, one.sample.shape[1])), CPU)
        for one in stats.values()
    }
    return {input_name(block, weight): bare[id(one)] for weight, one in stats.items()}


def _add(inputs: dict[str, InputStats], stats: Mapping[str, InputStats]) -> None:
    """Add a block's statistics; combine them with the first ones where the model passes a block twice."""
    combined: dict[int, InputStats] = {}
    for name, new in stats.items():
        if id(new) not in combined:
            combined[id(new)] = combine(inputs[name], new) if name in inputs else new
        inputs[name] = combined[id(new)]
