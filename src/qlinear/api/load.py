"""`qlinear.load`: a checkpoint as a transformers model in memory, its quantized linears as `QLinear`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.safetensors_header import parse_json
from ..errors import CheckpointError
from ..streaming.meta_model import build_meta_model
from ..streaming.open_model import open_checkpoint, parse_dtype
from ..streaming.streamed_model import StreamedModel


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Load a checkpoint as a transformers model in memory, its quantized linears as `QLinear`s.

    model: a checkpoint folder, a Hub id, or "demo". device: where the model is placed. dtype: of everything that is not
    quantized; None for the file's own. trust_remote_code: whether to run Python code of the checkpoint. revision:
    branch, tag or commit of a Hub id. Raises CheckpointError for a folder that is no checkpoint or is damaged.
    """
    checkpoint = open_checkpoint(model, revision)
    # A loaded model is used, perhaps on another device, so the file's dtype stays unless another is asked for.
    wanted = (
        parse_dtype(dtype) or build_meta_model(checkpoint.path, trust_remote_code=trust_remote_code).dtype
    )
    loaded = StreamedModel(checkpoint, wanted, trust_remote_code).load().to(device)
    if (checkpoint.path / "generation_config.json").is_file():
        loaded.generation_config = _generation_config(checkpoint.path)
    return loaded


def _generation_config(folder: Path) -> Any:
    """What generation_config.json says. Raises CheckpointError if transformers cannot use it."""
    from transformers import GenerationConfig

    try:
        parse_json((folder / "generation_config.json").read_bytes(), folder / "generation_config.json")
        return GenerationConfig.from_pretrained(folder)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder} has a generation_config.json that transformers cannot use: {' '.join(str(error).split())[:300]}"
        ) from None
