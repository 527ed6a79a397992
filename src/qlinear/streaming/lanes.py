"""Runs the model's own forward, paused at its block boundaries.

Why: a checkpoint can be larger than memory. So the whole calibration set passes through block 0, then through block 1,
and so on. Rewriting every architecture's forward for that would mean masks, rotary tables, shared key/value states and
per-layer inputs by hand, model by model.

How: every micro-batch is a `Lane`, which runs the unmodified `model.forward` in a thread of its own. When the forward
calls a block, the lane hands the call to the main thread and sleeps until it gets the block's output. Only one thread
runs at a time. All of a block's arithmetic happens in the main thread, because each new thread that multiplies would
start a thread pool of its own. Between two blocks a lane holds only what the model itself holds there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import StructureError
from .spill import Slot, Spill

R = TypeVar("R")

# Hidden states of fewer bytes stay in memory: writing them would cost more than it frees.
_MIN_SPILLED_BYTES = 64 << 10


class _Closed(BaseException):
    """Unwinds a lane that is no longer needed. Not an Exception, so that no model code catches it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A paused call of a block: the arguments that the model passed to it."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, by: nn.Module | None = None) -> Any:
        """The block's output for this call, or the output of the module `by` that replaces it."""
        forward = self.forward if by is None or by is self.module else by
        return forward(*self.args, **self.kwargs)

    def copied(self) -> "Call":
        """The same call on copies of its arguments."""
        args, kwargs = copied((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def run_until(self, stop: type[BaseException]) -> None:
        """Run the block for its hooks' sake, until one of them raises `stop`."""
        with suppress(stop):
            self.run()

    @property
    def hidden(self) -> Any:
        """The block's hidden state: its first argument."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


def copied(tree: Any) -> Any:
    """A copy of arguments: of tensors, and of objects that may hold tensors, such as a key/value cache."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return deepcopy(leaf) if hasattr(leaf, "__dict__") and not callable(leaf) else leaf

    return tree_map(copy, tree)


class Lane(threading.Thread):
    """One micro-batch in `model.forward`.

    call: the block call that the lane is paused in; None once the model has returned. output: the model's output, then.
    spill: where the hidden state waits while memory is short.
    """

    def __init__(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], spill: Spill | None = None
    ) -> None:
        super().__init__(daemon=True, name="lane")
        self.call: Call | None = None
        self.output: Any = None
        self._model, self._inputs = model, inputs
        self._spill, self._slot, self._is_spilled = spill, Slot(0, 0), False
        self._failure: BaseException | None = None
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._paused: SimpleQueue[None] = SimpleQueue()

    def run(self) -> None:
        """The thread's function: run the model. Exceptions reach the thread that steps the lane."""
        try:
            with torch.no_grad():
                self.output = self._model(**self._inputs)
        except _Closed:
            pass
        except BaseException as failure:
            self._failure = failure
        self._paused.put(None)

    @property
    def waiting(self) -> Call:
        """The paused call, with its hidden state in memory. Raises StructureError if the model has returned."""
        if self.call is None:
            raise StructureError("the lane has already passed the whole model")
        if self._spill is not None and self._is_spilled:
            self._spill.take(self.call.hidden, self._slot)
            self._is_spilled = False
        return self.call

    def wait_for(self, call: Call) -> Any:
        """Pause in `call` until the main thread gives its output, and return that. Called by the lane's own thread."""
        self.call = call
        del call
        self._paused.put(None)
        answer = self._answers.get()
        if isinstance(answer, _Closed):
            raise answer
        return answer

    def begin(self) -> None:
        """Run up to the first block."""
        self.start()
        self._until_paused()

    def advance(self, output: Any) -> None:
        """Give the paused call its output, and run up to the next block or the end."""
        self.call = None
        self._answers.put(output)
        self._until_paused()

    def step(self, by: nn.Module | None = None) -> None:
        """Run the paused block, or the module `by` that replaces it, and go on to the next block."""
        self.advance(self.waiting.run(by))

    def rehearse(self, run: Callable[[Call], R]) -> R:
        """Apply `run` to a copy of the paused call and return its result. The lane stays where it is."""
        result = run(self.waiting.copied())
        self._spill_hidden()
        return result

    def close(self) -> None:
        """End the lane wherever it is. A lane that is running, as after Ctrl-C, ends at its next block."""
        self.call = None
        self._answers.put(_Closed())
        self.join()

    def _until_paused(self) -> None:
        self._paused.get()
        if self._failure is not None:
            raise self._failure
        self._spill_hidden()

    def _spill_hidden(self) -> None:
        """Move the hidden state to the disk if memory is short."""
        if self._spill is None or self.call is None or not self._spill.is_short:
            return
        hidden = self.call.hidden
        if isinstance(hidden, Tensor) and hidden.nbytes >= _MIN_SPILLED_BYTES and hidden.device.type == "cpu":
            self._slot = self._spill.put(hidden, self._slot)
            self._is_spilled = True


class Lanes:
    """The micro-batches of a calibration set, all paused before the same block. A context manager.

    model: called once per lane. blocks: the modules to pause at. batches: keyword arguments of each call. spill: where
    hidden states wait while memory is short; None keeps all in memory. On entry every lane runs up to its first block.
    On exit all lanes end, and the model's modules are as they were.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        blocks: Sequence[nn.Module],
        batches: Sequence[Mapping[str, Any]],
        spill: Spill | None = None,
    ) -> None:
        self._blocks = list(dict.fromkeys(blocks))
        self._lanes = [Lane(model, batch, spill) for batch in batches]

    def __enter__(self) -> "Lanes":
        for block in self._blocks:
            block.forward = _pausing(block, block.forward)
        try:
            for lane in self._lanes:
                lane.begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for lane in self._lanes:
            if lane.ident is not None:
                lane.close()
        for block in self._blocks:
            del block.forward

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def __getitem__(self, index: int) -> Lane:
        return self._lanes[index]

    @property
    def at(self) -> nn.Module | None:
        """The block that all lanes are paused before; None once the model has returned in all of them.

        Raises StructureError if the lanes are at different blocks.
        """
        current = {
            id(lane.call.module): lane.call.module if lane.call else None for lane in self._lanes if lane.call
        }
        if not current:
            return None
        if len(current) > 1 or any(lane.call is None for lane in self._lanes):
            raise StructureError(
                "the model's path depends on its input: micro-batches stand before different blocks, so it cannot "
                "be calibrated block by block"
            )
        return next(iter(current.values()))


def _pausing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that pauses the lane that calls it; in any other thread it is `forward`."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        lane = threading.current_thread()
        if not isinstance(lane, Lane):
            return forward(*args, **kwargs)
        return lane.wait_for(Call(block, forward, args, kwargs))

    return paused


def batches_of(tokens: Tensor, batch_size: int) -> list[dict[str, Any]]:
    """Token ids (n, seq_len) as keyword arguments of model calls, one per micro-batch of `batch_size` rows."""
    return [{"input_ids": rows, "use_cache": False} for rows in torch.split(tokens, batch_size)]
