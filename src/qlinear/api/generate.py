"""`qlinear generate`: a quick look at what a model says."""

from pathlib import Path
from typing import Any

import torch

from ..data import check_length, load_tokenizer
from ..errors import DataError
from ..runtime.device import CPU, as_device, within_memory
from ..streaming.open_model import open_checkpoint
from .load import load


def generate(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = CPU,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> str:
    """Continue a prompt greedily with a checkpoint, quantized or not. Returns the new text alone.

    model: a checkpoint folder, a Hub id, or "demo". max_new_tokens: the most tokens to add. dtype: of everything
    that is not quantized. device: "cpu" or "cuda". Raises QLinearError where the device is not there, the model cannot
    be loaded or has no tokenizer, or prompt and new tokens are more than the model takes.
    """
    where = as_device(device)
    tokenizer = load_tokenizer(open_checkpoint(model, revision).path, trust_remote_code=trust_remote_code)
    with within_memory(where):
        loaded: Any = load(
            model, device=where, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(where)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise DataError("the prompt has no tokens: give a text to continue")
    try:
        check_length(loaded.config, length + max_new_tokens)
    except DataError as error:
        raise DataError(f"prompt of {length} tokens, max_new_tokens {max_new_tokens}: {error}") from None
    with torch.no_grad(), within_memory(where):
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
