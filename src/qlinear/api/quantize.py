"""`qlinear.quantize` and `qlinear quantize`: from the arguments to the result.

    Options.asked     the arguments, each checked on its own        pipeline.options
    open_model        the checkpoint, of which headers are read     streaming.open_model
    make_plan         the linears to quantize, and the result's size   pipeline.select_layers
    run               the loop over the blocks                      pipeline.run, pipeline.loop

Everything that can be refused is refused before `run`, when nothing has been written.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint.layouts import MigrationPolicy
from ..checkpoint.output_dir import require_empty, require_space
from ..data import Source
from ..formats.scheme import Scheme
from ..pipeline.block import Layer, Progress
from ..pipeline.check_weights import require_floats
from ..pipeline.options import Options, memory_limit, quantization_config, require_statistics
from ..pipeline.output.journal import can_resume, is_unfinished
from ..pipeline.run import Job, Result, run, target_of
from ..pipeline.select_layers import make_plan
from ..runtime.device import CPU, as_device
from ..runtime.distributed import Ranks
from ..streaming.open_model import calibration_ids, open_model
from ..streaming.streamed_model import StreamedModel
from .dry_run import estimate

__all__ = ["Layer", "Result", "quantize"]


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = "w8a8",
    *,
    smooth: float | Literal["auto", "off"] | None = None,
    migration_scale: MigrationPolicy = "unfolded",
    algorithm: str = "rtn",
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
    began, ranks, out = time.monotonic(), Ranks.present(), Path(out).expanduser()
    with ranks.raising_together():
        options = Options.asked(
            scheme=scheme, algorithm=algorithm, format=format, smooth=smooth, migration_scale=migration_scale,
            propagate=propagate, scheme_for=scheme_for, keep_worst=keep_worst, refine=refine, stats=stats,
            ignore=ignore, samples=samples, seq_len=seq_len, seed=seed, max_shard_size=max_shard_size,
        )  # fmt: skip
        where = as_device(device)
        source = open_model(model, dtype, trust_remote_code, revision, where, options.needs_data)
        source.checkpoint.require_unquantized()
        target = target_of(out, overwrite) if ranks.is_main else out
        resumes = ranks.is_main and resume and (target != out or not overwrite) and can_resume(target)
        if ranks.is_main and (target != out or not resumes):
            require_empty(out, overwrite or is_unfinished(out), source.checkpoint.path)
        job = _job(source, options, calibration, stats, max_memory)
        if ranks.is_main:
            require_space(out, job.plan.nbytes)
    ranks = replace(ranks, device=where)
    if plan:
        return ranks.on_main(lambda: estimate(job, out, began, progress, ranks.size))
    resumes, target = ranks.on_main(lambda: (resumes, target))
    return run(job, out, target, resumes=resumes, ranks=ranks, began=began, progress=progress)


def _job(
    source: StreamedModel,
    options: Options,
    calibration: Source,
    stats: str | Path | None,
    max_memory: int | None,
) -> Job:
    """The job with all that it needs read and checked, but the weights. Raises QLinearError."""
    layout = options.layout
    plan = make_plan(source, options.scheme, options.ignore, layout.HOLDS_TRANSPOSED, options.scheme_for)
    options = replace(options.for_model(plan), dtype=str(source.dtype).removeprefix("torch."))
    require_floats(source, plan)
    quantization_config(source, layout, plan)  # a layout may have no place for what was asked for
    statistics = None if stats is None else require_statistics(stats, source, options).to(source.device)
    memory = memory_limit(max_memory, source)
    if not options.needs_data:
        return Job(source, plan, replace(options, samples=0), None, statistics, memory)
    # With statistics at hand, tokens only serve to find and prove folds.
    text, samples, seq_len = (
        (calibration, options.samples, options.seq_len) if stats is None else ("random", 2, 16)
    )
    tokens = calibration_ids(text, source, samples, seq_len, options.seed)
    options = replace(options, samples=len(tokens), seq_len=tokens.shape[1])
    return Job(source, plan, options, tokens, statistics, memory)
