"""The orchestrator: what `qlinear quantize` and `qlinear.quantize` do, from validation to the model card.

arguments  what callers may ask for
order      all of it, checked, and how it is carried out
recipe     what is done to each linear, what is found of a block, what became of it
refusal    what is refused once weights are read, and that it leaves no trace
loop       one visible loop over the blocks:
  smoothing    the vector of each group of linears
  rounding     the algorithm that makes codes of their weights
  refining     the scales of all of them, tuned together
  writing      what a block becomes in the file
  reserve      the most sensitive linears, held back
  simulate     what the next blocks see of a quantized one
sink       where results go: of several processes, one writes
journal    what is finished, for a run that is killed
forecast   what it will take, without doing it
finish     what makes a folder of shards a checkpoint
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint.layouts import MigrationPolicy, get_layout, supported_migration
from ..checkpoint.output_dir import require_empty, require_space
from ..data import Source
from ..errors import OutputError
from ..formats.scheme import Scheme, get_scheme
from ..pipeline.block_state import Algorithm, Layer, Progress, Recipe, needs_data
from ..pipeline.check_weights import require_floats
from ..pipeline.options import (
    memory_limit,
    quantization_config,
    require_algorithm,
    require_count,
    require_refinable,
    require_statistics,
    smoothing_of,
)
from ..pipeline.output.journal import can_resume, is_unfinished
from ..pipeline.run import Order, Result, carry_out
from ..pipeline.select_layers import make_plan
from ..runtime.device import CPU, as_device
from ..runtime.distributed import Ranks
from ..streaming.open_model import calibration_ids, open_model
from .dry_run import estimate

__all__ = ["Layer", "Result", "quantize"]


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = "w8a8",
    *,
    smooth: float | Literal["auto", "off"] | None = None,
    migration_scale: MigrationPolicy = "unfolded",
    algorithm: Algorithm = "rtn",
    propagate: bool | None = None,
    scheme_for: Mapping[str, str | Scheme] | None = None,
    keep_worst: int = 0,
    refine: int = 0,
    format: str = "compressed-tensors",
    calibration: Source = "demo",
    samples: int = 128,
    seq_len: int = 512,
    stats: str | Path | None = None,
    ignore: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = CPU,
    seed: int = 0,
    max_shard_size: int = 5 * 10**9,
    max_memory: int | None = None,
    plan: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Quantize the linears of a checkpoint's decoder blocks, and write the result to a new folder.

    model: a checkpoint folder, a Hub id, or "demo". out: the folder to make. scheme: a preset's name, or a Scheme;
    "none" smooths and rounds nothing. smooth: alpha of SmoothQuant; "auto" to search it for each group; "off"; None
    for 0.5, or for AWQ's own search where `algorithm` is that. migration_scale: which smoothing vectors stay with
    their layers, where `format` has a place for them (for float layers "qlinear" alone): those that no producer can
    take ("unfolded"), all ("always") or none ("never"). algorithm: "rtn", "gptq" or "awq". propagate: whether
    blocks are calibrated with what the quantized blocks before them give; None for yes, unless rounding to nearest.
    scheme_for: other schemes by pattern of names. keep_worst: how many of the most sensitive linears to leave in
    float. refine: how many times the calibration set is seen to tune the scales of each block together, towards
    what the original gives. format: "compressed-tensors", "lmdeploy", "awq" or "qlinear". calibration: text (a
    file, "demo", a Hub id, an iterable of strings), "random", or token ids (n, seq_len). samples, seq_len: how much
    of it is used. stats: what `qlinear calibrate` wrote, instead of that. ignore: patterns of linears to leave in
    float; the output head if None. dtype: what the calibration computes in. device: what it all is computed on:
    "cpu", "cuda" (under torchrun each process's own) or "cuda:1". max_memory: bytes to stay within; hidden states
    of the calibration set wait on the disk beyond it. plan: only say what it will take, after a short trial;
    nothing is written. resume: go on with an unfinished run into `out`; False starts anew. progress: called with
    (stage, done, total).
    Raises QLinearError, before any work, for whatever cannot be done; nothing is written then.
    """
    began, ranks = time.monotonic(), Ranks.present()
    with ranks.raising_together():
        wanted, out = None if scheme == "none" else get_scheme(scheme), Path(out)
        if max_shard_size < 1:
            raise OutputError(f"max_shard_size must be at least 1 byte; got {max_shard_size}")
        layout = get_layout(format)
        keep = supported_migration(migration_scale, format, wanted)
        where = as_device(device)
        others = {pattern: get_scheme(each) for pattern, each in (scheme_for or {}).items()}
        algorithm, keep_worst = require_algorithm(algorithm), require_count(keep_worst, wanted)
        smoothing = smoothing_of(smooth, algorithm, wanted)
        refine = require_refinable(refine, wanted, propagate, stats is not None)
        schemes = [each for each in (wanted, *others.values()) if each is not None]
        computes = needs_data(smoothing, algorithm, schemes, keep_worst, refine)
        source = open_model(model, dtype, trust_remote_code, revision, where, computes)
        source.checkpoint.require_unquantized()
        resumes = ranks.is_main and resume and not overwrite and can_resume(out)
        if ranks.is_main and not resumes:
            require_empty(out, overwrite or is_unfinished(out), source.checkpoint.path)
        chosen = make_plan(source, wanted, ignore, layout.HOLDS_TRANSPOSED, others)
        recipe = Recipe(
            chosen.schemes, layout, algorithm, smoothing,
            algorithm != "rtn" or refine > 0 if propagate is None else propagate, keep_worst, keep,
            frozenset() if keep == "never" else chosen.holders, refine,
        )  # fmt: skip
        require_floats(source, chosen)
        quantization_config(source, layout, chosen, ())  # a layout may have no place for what was asked for
        if ranks.is_main:
            require_space(out, chosen.nbytes)
        statistics = None if stats is None else require_statistics(stats, source, recipe).to(where)
        memory = memory_limit(max_memory, source)
        tokens = None
        if recipe.needs_data:
            # With statistics at hand, tokens only serve to find and prove folds.
            text, samples, seq_len = (calibration, samples, seq_len) if stats is None else ("random", 2, 16)
            tokens = calibration_ids(text, source, samples, seq_len, seed)
    settings = {
        "scheme": "none" if wanted is None else wanted.name, "format": format, "algorithm": algorithm,
        "smooth": "off" if recipe.smooth is None else recipe.smooth, "migration_scale": keep,
        "propagate": recipe.propagate, "scheme_for": {pattern: each.name for pattern, each in others.items()},
        "keep_worst": keep_worst, "refine": refine, "stats": None if stats is None else Path(stats).name,
        "ignore": None if ignore is None else list(ignore),
        "samples": 0 if tokens is None else len(tokens),
        "seq_len": seq_len if tokens is None else tokens.shape[1], "seed": seed,
        "dtype": str(source.dtype).removeprefix("torch."), "max_shard_size": max_shard_size,
    }  # fmt: skip
    ranks = replace(ranks, device=where)
    order = Order(source, chosen, recipe, tokens, statistics, memory, settings)
    if plan:
        return ranks.on_main(lambda: estimate(order, out, began, progress, ranks.size))
    goes_on = ranks.on_main(lambda: resumes)
    return carry_out(
        order, out, goes_on=goes_on, overwrite=overwrite, ranks=ranks, began=began, progress=progress
    )
