"""Opens what a user names: a model (a folder, a Hub id, `demo`), and its text (a file, a Hub id, `demo`, token ids)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import demo
from ..checkpoint.reader import Checkpoint
from ..data import Source, load_tokenizer, token_ids
from ..errors import DataError, SchemeError
from ..runtime.device import CPU
from .streamed_model import StreamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a folder or a Hub id, or the embedded one for `demo`. Raises CheckpointError."""
    return Checkpoint.open(demo.checkpoint_path() if str(model) == "demo" else model, revision)


def open_model(
    model: str | Path,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device: torch.device = CPU,
    computes: bool = True,
) -> StreamedModel:
    """A checkpoint as a model to be streamed; only headers are read.

    dtype: what it computes in; None for the device's best (see `StreamedModel`). computes: whether anything will be
    computed. If not, and without `dtype`, weights keep the file's dtype, which is the fastest to read.
    """
    name = model_name(model)
    checkpoint, wanted = open_checkpoint(model, revision), parse_dtype(dtype)
    if wanted is None and not computes:
        wanted = checkpoint.matrix_dtype
    return StreamedModel(checkpoint, wanted, trust_remote_code, name, device)


def model_name(model: str | Path) -> str:
    """What to call a model: a folder by its last part, a snapshot in the Hub's cache by its id, others as they are."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model)
    folder = Path(os.path.abspath(folder))
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return "/".join(repository.split("--")[1:])
    return folder.name


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name in torch. Raises SchemeError unless it is float32, bfloat16 or float16."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise SchemeError(f"dtype must be one of {', '.join(known)}; got {dtype!r}")
    return known[dtype]


def calibration_ids(text: Source, model: StreamedModel, samples: int, seq_len: int, seed: int) -> Tensor:
    """Token ids (n, seq_len), int64, to calibrate a model on, chosen by `seed`. Raises DataError."""
    source = demo.calibration_text() if isinstance(text, str) and text == "demo" else text
    return _ids(source, model, samples, seq_len, seed)


def evaluation_ids(text: Source, model: StreamedModel, tokens: int, seq_len: int) -> Tensor:
    """The first `tokens` token ids of a text as (n, seq_len), int64, to evaluate a model on. Raises DataError."""
    source = demo.evaluation_text() if isinstance(text, str) and text == "demo" else text
    seq_len = min(seq_len, tokens)
    if seq_len < 2:
        raise DataError(f"tokens and seq_len must be at least 2, one to predict the next from; got {seq_len}")
    ids = _ids(source, model, tokens // seq_len, seq_len, None)
    if ids.shape[1] < 2:
        raise DataError(
            "sequences of one token predict nothing: give token ids (n, seq_len) with seq_len at least 2"
        )
    return ids


def _ids(source: Source, model: StreamedModel, samples: int, seq_len: int, seed: int | None) -> Tensor:
    def tokenizer() -> "PreTrainedTokenizerBase":
        return load_tokenizer(model.checkpoint.path, trust_remote_code=model.trust_remote_code)

    return token_ids(source, samples, seq_len, config=model.model.config, tokenizer=tokenizer, seed=seed)
