"""Whether a model runs at all, as transformers has it: asked after something failed while it ran.

What fails inside a model's forward can be the model's own fault (a config that its class takes and cannot run with) or
ours. So the model is run once more as it is, with nothing of ours in its way; what fails again is the model's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import QLinearError, StructureError
from .random_weights import each_kind_once, one_column_weights, random_weights, short_dummy_ids

# What other people's code raises where it can't go on.
_FOREIGN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def diagnosing(given: Callable[[], tuple[nn.Module, Mapping[str, nn.Module]]]) -> Iterator[None]:
    """Inside, what fails because the model's own forward does is a StructureError that says so.

    given: the model, with its parameters on meta, and its blocks by name; called after a failure.
    """
    try:
        yield
    except QLinearError:
        raise
    except _FOREIGN:
        require_runs(*given())
        raise


def require_runs(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Raise StructureError if the model cannot be run on a few tokens, with random weights; it names the block.

    model: with its parameters on meta.
    """
    running: list[str] = []
    try:
        with (
            torch.no_grad(),
            random_weights(model.modules(), one_column_weights),
            each_kind_once(blocks) as running,
        ):
            model(short_dummy_ids(model), use_cache=False)
    except _FOREIGN as error:
        where = f"in {running[-1]}" if running else "outside of its blocks"
        reason = " ".join(str(error).split())[:300]
        raise StructureError(
            f"transformers cannot run this model: the forward of {type(model).__name__} raises {type(error).__name__} "
            f"{where} ({reason}): mend its config.json, or use the transformers version that it was made with"
        ) from error
