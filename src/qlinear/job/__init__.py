"""The orchestrator: what `qlinear quantize` and `qlinear.quantize` do, from validation to the model card.

plan     what is quantized, and what is refused, before the first weight is read
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
from ..checkpoint.compressed_tensors import quantization_config
from ..data import Source
from ..errors import SchemeError
from ..inputs import calibration_ids, open_model
from ..plan import make_plan
from ..scheme import Scheme, get_scheme
from .finish import finish
from .loop import Job, Layer, Progress

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

    model: a checkpoint folder, a Hub id, or "demo". out: the folder to make. scheme: a preset's name, or a Scheme.
    smooth: alpha of SmoothQuant, or "off". calibration: text (a file, "demo", a Hub id, an iterable of strings),
    "random", or token ids (n, seq_len). samples, seq_len: how much of it is used. ignore: patterns of linears to leave
    in float; the output head if None. dtype: what the calibration computes in. progress: called with (stage, done,
    total). Raises QLinearError, before any work, for whatever cannot be done; nothing is written then.
    """
    began = time.monotonic()
    scheme, alpha, out = get_scheme(scheme), _alpha(smooth), Path(out)
    source = open_model(model, dtype, trust_remote_code, revision)
    source.checkpoint.require_unquantized()
    require_empty(out, overwrite, source.checkpoint.path)
    plan = make_plan(source, scheme, ignore)
    require_space(out, plan.nbytes)
    tokens = None if alpha is None else calibration_ids(calibration, source, samples, seq_len, seed)
    clear(out)
    job = Job(source, ShardWriter(out, max_shard_size), scheme, plan.chosen, alpha, tokens, progress)
    job.run()
    settings = {
        "scheme": scheme.name, "smooth": smooth, "samples": 0 if tokens is None else len(tokens),
        "seq_len": seq_len, "seed": seed, "dtype": str(source.dtype).removeprefix("torch."),
    }  # fmt: skip
    record = {"settings": settings, "layers": [asdict(layer) for layer in job.layers]}
    untied = source.head_name in plan.chosen and source.model.config.tie_word_embeddings
    finish(
        out,
        source.checkpoint,
        quantization_config(dict.fromkeys(plan.chosen, scheme), plan.ignored),
        untied,
        record,
    )
    return Result(
        str(out), time.monotonic() - began, peak_rss(), Checkpoint.open(out).nbytes, source.checkpoint.nbytes,
        tuple(job.layers), tuple(job.warnings),
    )  # fmt: skip


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
