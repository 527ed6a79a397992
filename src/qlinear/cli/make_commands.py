"""The commands that write: `quantize`, `calibrate` and `convert`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import typer

from . import options as o
from .app import app, is_one_of_many
from .display import Bars, show, show_calibration, show_result

if TYPE_CHECKING:
    from ..runtime.distributed import Ranks


@app.command(
    epilog="""
Examples:

    qlinear quantize demo build/demo-w8a8

    qlinear quantize ./Llama-3.2-1B out --calibration mine.jsonl --samples 256

    qlinear quantize ./model out --scheme w4a16 --algorithm gptq --smooth auto --scheme-for '*.down_proj=w8a16'

    qlinear quantize ./model out --smooth off --ignore 're:.*down_proj' --ignore lm_head

    qlinear quantize ./model out --algorithm gptq --device cuda

    torchrun --nproc-per-node 2 -m qlinear quantize ./model out --algorithm gptq
"""
)
def quantize(
    model: o.Model,
    out: o.Out,
    scheme: o.SchemeName = "w8a8",
    algorithm: o.AlgorithmName = "rtn",
    smooth: o.Smooth = None,
    migration_scale: o.Policy = "unfolded",
    format: o.LayoutName = "compressed-tensors",
    calibration: o.Calibration = "demo",
    samples: o.Samples = 128,
    seq_len: o.SeqLen = 512,
    stats: o.StatsIn = None,
    ignore: o.Ignore = None,
    scheme_for: o.SchemeFor = None,
    keep_worst: o.KeepWorst = 0,
    refine: o.Refine = 0,
    propagate: o.Propagate = None,
    dtype: o.Dtype = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    max_shard_size: o.ShardSize = "5GB",
    max_memory: o.Memory = None,
    plan: o.OnlyPlan = False,
    overwrite: o.Overwrite = False,
    resume: o.Resume = True,
    trust_remote_code: o.Trust = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a smaller checkpoint, and say what that cost each layer."""
    from ..api.quantize import quantize as run

    with _ranks() as ranks, Bars(quiet or not ranks.is_main) as bars:
        result = run(
            model, out, scheme, smooth=o.parse_alpha(smooth), migration_scale=cast(Any, migration_scale),
            algorithm=cast(Any, algorithm), propagate=propagate, scheme_for=o.parse_rules(scheme_for),
            keep_worst=keep_worst, refine=refine, format=format, calibration=calibration, samples=samples,
            seq_len=seq_len, stats=stats, ignore=ignore, dtype=dtype, device=device, seed=seed,
            max_shard_size=o.parse_bytes(max_shard_size, "--max-shard-size"),
            max_memory=None if max_memory is None else o.parse_bytes(max_memory, "--max-memory"),
            plan=plan, overwrite=overwrite, resume=resume, trust_remote_code=trust_remote_code, revision=revision,
            progress=bars.update,
        )  # fmt: skip
    if ranks.is_main:
        show(result, as_json, show_result)


@app.command(
    epilog="""
Examples:

    qlinear calibrate ./model stats.safetensors --calibration mine.jsonl

    qlinear calibrate ./model inputs_stats.pth --samples 256
"""
)
def calibrate(
    model: o.Model,
    stats: o.StatsOut,
    calibration: o.Data = "demo",
    samples: o.Samples = 128,
    seq_len: o.SeqLen = 512,
    dtype: o.Dtype = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: o.OverwriteFile = False,
    trust_remote_code: o.Trust = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write the statistics of every linear's input: absmax, absmean, min, max and mean of each channel."""
    from ..api.calibrate import write_statistics as run

    with _ranks() as ranks, Bars(quiet or not ranks.is_main) as bars:
        report = run(
            model, stats, calibration=calibration, samples=samples, seq_len=seq_len, dtype=dtype, device=device,
            seed=seed, overwrite=overwrite, trust_remote_code=trust_remote_code, revision=revision,
            progress=bars.update,
        )  # fmt: skip
    if ranks.is_main:
        show(report, as_json, show_calibration)


@app.command(epilog="Example:\n\n    qlinear convert build/demo-w8a8 build/demo-lmdeploy --format lmdeploy")
def convert(
    model: o.QuantizedModel,
    out: o.Out,
    format: o.LayoutName,
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
) -> None:
    """Write a quantized checkpoint in another layout; no code is touched."""
    from ..api.convert import convert as run

    folder = run(model, out, format, overwrite=overwrite, revision=revision)
    typer.echo(json.dumps({"out": str(folder)}) if as_json else str(folder))


@contextmanager
def _ranks() -> Iterator["Ranks"]:
    """Context manager: the processes that torchrun started, connected; or this one alone."""
    from ..runtime.distributed import Ranks, torchrun_group

    with torchrun_group() if is_one_of_many() else nullcontext(Ranks()) as ranks:
        yield ranks
