"""Weights that cannot be quantized are refused by name: stored as codes, or with NaN or infinity in them."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, NumericsError
from ..formats.finite import count_bad
from ..streaming.streamed_model import StreamedModel
from .select_layers import Plan, is_parameter

_FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# Bytes of a file that are looked through at once: they stay in a core's cache.
_CHUNK = 512 << 10


def require_floats(source: StreamedModel, plan: Plan) -> None:
    """Raise CheckpointError if a linear that is to be quantized is stored as codes of some kind."""
    for name in sorted(plan.chosen):
        weight = source.names.sources(name if is_parameter(source, name) else f"{name}.weight")[0]
        info = source.checkpoint.info(weight)
        if info.dtype not in _FLOAT:
            raise CheckpointError(
                f"{info.file} holds {weight} as {info.dtype_name}, which is quantized already: give the float "
                "checkpoint that it was made from"
            )


def require_finite(source: StreamedModel, progress: Callable[[str, int, int], None]) -> None:
    """Raise NumericsError if a weight outside of the blocks holds NaN or infinity."""
    inside = tuple(f"{name}." for name in source.blocks)
    parameters = [name for name, _ in source.model.named_parameters() if not name.startswith(inside)]
    names = list(dict.fromkeys(s for name in parameters for s in source.names.sources(name)))
    for i, name in enumerate(names):
        progress("checking weights", i, len(names))
        _require_finite(source.checkpoint, name)
    progress("checking weights", len(names), len(names))


@contextmanager
def finding_bad_weights(source: StreamedModel, block: nn.Module, rounded: Container[str]) -> Iterator[None]:
    """Raise NumericsError if a weight of a block that is in memory holds NaN or infinity.

    rounded: the linears whose weights are only rounded inside, which finds it.
    """
    require_finite_block(source, block, rounded)
    try:
        yield
    except NumericsError:
        require_finite_block(source, block)  # which says more: the file, and what to do about it
        raise


def require_finite_block(source: StreamedModel, block: nn.Module, but: Container[str] = ()) -> None:
    """Raise NumericsError if a weight of a block that is in memory, but for some linears', holds NaN or infinity."""
    for name, parameter in block.named_parameters(source.name_of(block)):
        is_left_out = name in but or name.removesuffix(".weight") in but
        if not is_left_out and count_bad(parameter.detach()):
            for tensor in source.names.sources(name):
                _require_finite(source.checkpoint, tensor)


def _require_finite(checkpoint: Checkpoint, name: str) -> None:
    """Raise NumericsError, naming the tensor and counting, if the file holds NaN or infinity in it."""
    bad = sum(count_bad(part) for part in _parts(checkpoint, name))
    if bad:
        info = checkpoint.info(name)
        raise NumericsError(
            f"{name} holds {bad} NaN or infinite of {torch.Size(info.shape).numel()} elements, in {info.file}: "
            "download it again, or mend the model"
        )


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor's elements some at a time, flat, if they are floating point numbers that torch can add up."""
    dtype = checkpoint.info(name).dtype
    if dtype in _FLOAT:
        for part in checkpoint.chunks(name, _CHUNK):
            yield torch.frombuffer(part, dtype=dtype)
