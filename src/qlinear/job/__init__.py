"""The orchestrator: what `qlinear quantize` and `qlinear.quantize` do, from validation to the model card.

plan     what is quantized, and what is refused, before the first weight is read
refusal  what is refused once weights are read, and that it leaves no trace
loop     one visible loop over the blocks
finish   what makes a folder of shards a checkpoint
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..checkpoint import Checkpoint, ShardWriter, clear, require_empty, require_space
from ..checkpoint.layouts import get_layout
from ..data import Source
from ..errors import SchemeError
from ..inputs import calibration_ids, open_model
from ..plan import make_plan
from ..scheme import Scheme, get_scheme
from .finish import finish
from .loop import Job, Keep, Layer, Progress, Recipe
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
    smooth: float | Literal["off"] = 0.5,
    migration_scale: Keep = "unfolded",
    format: str = "compressed-tensors",
    calibration: Source = "demo",
    samples: int = 128,
    seq_len: int = 512,
    ignore: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Quantize the linears of a checkpoint's decoder blocks, and write the result to a new folder.

    model: a checkpoint folder, a Hub id, or "demo". out: the folder to make. scheme: a preset's name, or a Scheme;
    "none" smooths and rounds nothing. smooth: alpha of SmoothQuant, or "off". migration_scale: which smoothing vectors
    stay with their layers, where `format` has a place for them: those that no producer can take ("unfolded"), all
    ("always") or none ("never"). format: "compressed-tensors", "lmdeploy", "awq" or "qlinear". calibration: text (a
    file, "demo", a Hub id, an iterable of strings), "random", or token ids (n, seq_len). samples, seq_len: how much of
    it is used. ignore: patterns of linears to leave in float; the output head if None. dtype: what the calibration
    computes in. progress: called with (stage, done, total).
    Raises QLinearError, before any work, for whatever cannot be done; nothing is written then.
    """
    began = time.monotonic()
    wanted, alpha, out = None if scheme == "none" else get_scheme(scheme), _alpha(smooth), Path(out)
    layout = get_layout(format)
    keep = _kept(migration_scale, format, wanted)
    source = open_model(model, dtype, trust_remote_code, revision)
    source.checkpoint.require_unquantized()
    require_empty(out, overwrite, source.checkpoint.path)
    plan = make_plan(source, wanted, ignore, transposed=format in ("qlinear", "lmdeploy"))
    require_floats(source, plan)
    config = None if wanted is None else layout.quantization_config(wanted, plan.ignored)
    require_space(out, plan.nbytes)
    needs_data = alpha is not None or (wanted is not None and wanted.is_static)
    tokens = calibration_ids(calibration, source, samples, seq_len, seed) if needs_data else None
    require_finite(source, progress)
    existed = out.is_dir()
    clear(out)
    writer = ShardWriter(out, max_shard_size)
    job = Job(source, writer, Recipe(wanted, plan.chosen, alpha, layout, keep), tokens, progress)
    with leaving_no_trace(writer, existed):
        job.run()
    settings = {
        "scheme": "none" if wanted is None else wanted.name, "format": format, "smooth": smooth,
        "migration_scale": keep, "samples": 0 if tokens is None else len(tokens),
        "seq_len": seq_len if tokens is None else tokens.shape[1], "seed": seed,
        "dtype": str(source.dtype).removeprefix("torch."),
    }  # fmt: skip
    record = {"settings": settings, "layers": [asdict(layer) for layer in job.layers]}
    untied = source.head_name in plan.chosen and source.model.config.tie_word_embeddings
    finish(out, source, config, untied, record)
    return Result(
        str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
        tuple(job.layers), tuple(job.warnings),
    )  # fmt: skip


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


def _alpha(smooth: float | str) -> float | None:
    if smooth == "off":
        return None
    if isinstance(smooth, str) or not 0 <= smooth <= 1:
        raise SchemeError(f"smooth must be a number in [0, 1] or 'off'; got {smooth!r}")
    return float(smooth)


def peak_rss() -> int:
    """The most memory that this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
