"""The orchestrator: what `qlinear quantize` and `qlinear.quantize` do, from validation to the model card.

recipe     what is done to each linear, what is found of a block, what became of it
refusal    what is refused once weights are read, and that it leaves no trace
loop       one visible loop over the blocks:
  smoothing    the vector of each group of linears
  rounding     the algorithm that makes codes of their weights
  writing      what a block becomes in the file
  reserve      the most sensitive linears, held back
  simulate     what the next blocks see of a quantized one
journal    what is finished, for a run that is killed
finish     what makes a folder of shards a checkpoint
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint import Checkpoint, StreamedModel, clear, require_empty, require_space
from ..checkpoint.layout import Layout
from ..checkpoint.layouts import get_layout
from ..checkpoint.statistics import Statistics, load_statistics
from ..data import Source
from ..errors import OutputError, SchemeError
from ..inputs import calibration_ids, open_model
from ..plan import Plan, file_names, make_plan
from ..scheme import Scheme, get_scheme
from .finish import finish
from .journal import begin, can_be_taken_up, discard, identity, is_unfinished
from .loop import Job
from .recipe import Algorithm, Keep, Layer, Progress, Recipe
from .refusal import leaving_no_trace, require_finite, require_floats

__all__ = ["Layer", "Result", "quantize"]


@dataclass(frozen=True, slots=True)
class Result:
    """What the job did. out: the folder. total_size: bytes of tensor data in it. warnings: what a user should know."""

    out: str
    seconds: float
    peak_rss_bytes: int
    total_size: int
    source_size: int
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = "w8a8",
    *,
    smooth: float | Literal["auto", "off"] | None = None,
    migration_scale: Keep = "unfolded",
    algorithm: Algorithm = "rtn",
    propagate: bool | None = None,
    scheme_for: Mapping[str, str | Scheme] | None = None,
    keep_worst: int = 0,
    format: str = "compressed-tensors",
    calibration: Source = "demo",
    samples: int = 128,
    seq_len: int = 512,
    stats: str | Path | None = None,
    ignore: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Quantize the linears of a checkpoint's decoder blocks, and write the result to a new folder.

    model: a checkpoint folder, a Hub id, or "demo". out: the folder to make. scheme: a preset's name, or a Scheme;
    "none" smooths and rounds nothing. smooth: alpha of SmoothQuant; "auto" to search it for each group; "off"; None for
    0.5, or for AWQ's own search where `algorithm` is that. migration_scale: which smoothing vectors stay with their
    layers, where `format` has a place for them: those that no producer can take ("unfolded"), all ("always") or none
    ("never"). algorithm: "rtn", "gptq" or "awq". propagate: whether blocks are calibrated with what the quantized
    blocks before them give; None for yes, unless rounding to nearest. scheme_for: other schemes by pattern of names.
    keep_worst: how many of the most sensitive linears to leave in float. format: "compressed-tensors", "lmdeploy",
    "awq" or "qlinear". calibration: text (a file, "demo", a Hub id, an iterable of strings), "random", or token ids
    (n, seq_len). samples, seq_len: how much of it is used. stats: what `qlinear calibrate` wrote, instead of that.
    ignore: patterns of linears to leave in float; the output head if None. dtype: what the calibration computes in.
    resume: go on with an unfinished run into `out`; False starts anew. progress: called with (stage, done, total).
    Raises QLinearError, before any work, for whatever cannot be done; nothing is written then.
    """
    began = time.monotonic()
    wanted, out = None if scheme == "none" else get_scheme(scheme), Path(out)
    if max_shard_size < 1:
        raise OutputError(f"max_shard_size must be at least 1 byte; got {max_shard_size}")
    layout = get_layout(format)
    keep = _kept(migration_scale, format, wanted)
    source = open_model(model, dtype, trust_remote_code, revision)
    source.checkpoint.require_unquantized()
    goes_on = resume and not overwrite and can_be_taken_up(out)
    if not goes_on:
        require_empty(out, overwrite or is_unfinished(out), source.checkpoint.path)
    others = {pattern: get_scheme(each) for pattern, each in (scheme_for or {}).items()}
    plan = make_plan(source, wanted, ignore, format in ("qlinear", "lmdeploy"), others)
    recipe = Recipe(
        plan.schemes, layout, _algorithm(algorithm), _smoothing(smooth, algorithm, wanted),
        algorithm != "rtn" if propagate is None else propagate, _count(keep_worst, wanted), keep,
    )  # fmt: skip
    require_floats(source, plan)
    config = _config(source, layout, plan, ())
    require_space(out, plan.nbytes)
    statistics = None if stats is None else _statistics(stats, source, recipe)
    tokens = None
    if recipe.needs_data:
        # With statistics at hand, tokens only serve to find and prove folds.
        text, samples, seq_len = (calibration, samples, seq_len) if statistics is None else ("random", 2, 16)
        tokens = calibration_ids(text, source, samples, seq_len, seed)
    settings = {
        "scheme": "none" if wanted is None else wanted.name, "format": format, "algorithm": algorithm,
        "smooth": "off" if recipe.smooth is None else recipe.smooth, "migration_scale": keep,
        "propagate": recipe.propagate, "scheme_for": {pattern: each.name for pattern, each in others.items()},
        "keep_worst": keep_worst, "stats": None if stats is None else Path(stats).name,
        "ignore": None if ignore is None else list(ignore),
        "samples": 0 if tokens is None else len(tokens),
        "seq_len": seq_len if tokens is None else tokens.shape[1], "seed": seed,
        "dtype": str(source.dtype).removeprefix("torch."), "max_shard_size": max_shard_size,
    }  # fmt: skip
    existed = out.is_dir()
    if not goes_on:
        require_finite(source, progress, with_blocks=overwrite and out.is_dir())
        discard(out)
        clear(out)
    writer, journal = begin(out, settings | identity(source, tokens), max_shard_size)
    job = Job(source, writer, journal, recipe, tokens, progress, statistics)
    with leaving_no_trace(job, existed):
        job.run()
    if job.kept:
        config = _config(source, layout, plan, job.kept)
    record = {"settings": settings, "layers": [asdict(layer) for layer in job.layers]}
    untied = source.head_name in plan.chosen and source.model.config.tie_word_embeddings
    finish(out, source, config, untied, record)
    job.journal.remove()
    return Result(
        str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
        tuple(job.layers), (*plan.notes, *job.warnings),
    )  # fmt: skip


def _statistics(stats: str | Path, source: StreamedModel, recipe: Recipe) -> Statistics:
    """Statistics from a file. Raises SchemeError for what needs the inputs themselves."""
    if recipe.algorithm != "rtn" or isinstance(recipe.smooth, str) or recipe.propagate:
        raise SchemeError(
            f"algorithm {recipe.algorithm!r} with smooth {recipe.smooth!r} looks at inputs, of which {stats} holds "
            "only statistics: give --calibration instead"
        )
    return load_statistics(stats, source.checkpoint.fingerprint())


def _config(source: StreamedModel, layout: Layout, plan: Plan, kept: Sequence[str]) -> dict[str, Any] | None:
    """config.json's part on quantization, for the linears that are not `kept` in float after all."""
    if not plan.schemes:
        return None
    left = dict.fromkeys(name for each in kept for name in (each, source.names.source_module(each)))
    used = {scheme for name, scheme in plan.schemes.items() if name not in left}
    if len(used) == 1:
        return layout.quantization_config(used.pop(), (*plan.ignored, *left))
    named = {
        file_name: scheme
        for name, scheme in plan.schemes.items()
        if name not in left
        for file_name in file_names(source, name)
    }
    return layout.quantization_config(named, (*plan.ignored, *left))


def _kept(migration_scale: Keep, format: str, scheme: Scheme | None) -> Keep:
    """Which vectors stay with their layers, where the layout has a place for them."""
    if migration_scale not in ("unfolded", "always", "never"):
        raise SchemeError(f"migration_scale must be unfolded, always or never; got {migration_scale!r}")
    has_place = format in ("qlinear", "lmdeploy") and scheme is not None
    if migration_scale == "always" and not has_place:
        raise SchemeError(
            f"migration_scale 'always' needs a format that holds it, qlinear or lmdeploy; got {format!r}"
        )
    return migration_scale if has_place else "never"


def _algorithm(algorithm: Algorithm) -> Algorithm:
    if algorithm not in ("rtn", "gptq", "awq"):
        raise SchemeError(f"algorithm must be rtn, gptq or awq; got {algorithm!r}")
    return algorithm


def _smoothing(
    smooth: float | str | None, algorithm: Algorithm, scheme: Scheme | None
) -> float | Literal["auto", "awq"] | None:
    if smooth is None:
        return "awq" if algorithm == "awq" else 0.5
    if smooth == "off":
        return None
    if smooth == "auto":
        if scheme is None:
            raise SchemeError(
                "smooth 'auto' looks for the least error of a scheme, and scheme 'none' has none: give a number"
            )
        return "auto"
    if isinstance(smooth, str) or not 0 <= smooth <= 1:
        raise SchemeError(f"smooth must be a number in [0, 1], 'auto' or 'off'; got {smooth!r}")
    return float(smooth)


def _count(keep_worst: int, scheme: Scheme | None) -> int:
    if keep_worst < 0 or (keep_worst and scheme is None):
        raise SchemeError(
            f"keep_worst must be 0 or more, and 0 where nothing is quantized; got {keep_worst} with scheme "
            f"{'none' if scheme is None else scheme.name!r}"
        )
    return keep_worst


def peak_rss() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
