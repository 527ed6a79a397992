"""Tells a fault of the model from a fault of qlinear, after a forward has failed.

A forward can fail because of the model, for example a config that its class accepts but cannot run, or because of
qlinear. So the unmodified model is run once more on random weights. If that fails too, the fault is the model's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import QLinearError, StructureError
from .random_weights import one_column_weights, one_run_per_kind, random_weights, short_dummy_ids

# What a model's code may raise.
_MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def diagnosing(make_model: Callable[[], tuple[nn.Module, Mapping[str, nn.Module]]]) -> Iterator[None]:
    """Context manager: a failure of the model's own forward becomes a StructureError.

    make_model: called after a failure; returns the unmodified model, its parameters on meta, and its blocks by name.
    """
    try:
        yield
    except QLinearError:
        raise
    except _MODEL_ERRORS:
        require_runs(*make_model())
        raise


def require_runs(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Raise StructureError, naming the block, if the model cannot run a few tokens with random weights.

    model: with its parameters on meta.
    """
    running: list[str] = []
    try:
        with (
            torch.no_grad(),
            random_weights(model.modules(), one_column_weights),
            one_run_per_kind(blocks) as running,
        ):
            model(short_dummy_ids(model), use_cache=False)
    except _MODEL_ERRORS as error:
        where = f"in {running[-1]}" if running else "outside of its blocks"
        reason = " ".join(str(error).split())[:300]
        is_narrow = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
        wider = "run it in float32 with --dtype float32, " if is_narrow else ""
        raise StructureError(
            f"transformers cannot run this model: the forward of {type(model).__name__} raises {type(error).__name__} "
            f"{where} ({reason}): {wider}mend its config.json, or use the transformers version that it was made with"
        ) from error
