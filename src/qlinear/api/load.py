"""`qlinear.load`: a checkpoint as a transformers model in memory, its quantized linears as `QLinear`."""

from pathlib import Path

import torch
from torch import nn

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
    """A checkpoint as a transformers model in memory; the linears of a quantized one are `QLinear`s.

    dtype: of what is not quantized; the file's own if None. Raises CheckpointError if it is none or is damaged.
    """
    checkpoint = open_checkpoint(model, revision)
    # The file's own dtype unless asked: what is loaded is for use, where the caller's processor decides.
    wanted = (
        parse_dtype(dtype) or build_meta_model(checkpoint.path, trust_remote_code=trust_remote_code).dtype
    )
    return StreamedModel(checkpoint, wanted, trust_remote_code).load().to(device)
