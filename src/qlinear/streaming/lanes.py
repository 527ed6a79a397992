"""The model's own forward, paused at its block boundaries.

A checkpoint can be larger than memory, so the calibration set has to pass through the model one block at a
time: all of it through block 0, then all of it through block 1. Rewriting each architecture's forward to do
that would mean masks, rotary tables, shared key/value states and per-layer inputs by hand, model by model.

Instead every micro-batch is a `Lane`: the unmodified `model.forward` in a thread of its own. When it calls a
block, the call is handed to the main thread and the lane sleeps until it is given the block's output. Only one
thread ever runs, and all of a block's arithmetic happens in the main one (each new thread that multiplies would
start a pool of its own). Between two blocks a lane holds what the model holds there, and nothing else.
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

# Bytes that a hidden state must have for the disk to be worth its while.
_WORTH_IT = 64 << 10


class _Closed(BaseException):
    """Unwinds a lane that is no longer needed; not an Exception, so that no model code swallows it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a block that is waiting to be answered: what the model passed to it."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, by: nn.Module | None = None) -> Any:
        """The block's output for this call, or that of what stands in its place."""
        forward = self.forward if by is None or by is self.module else by
        return forward(*self.args, **self.kwargs)

    def copied(self) -> "Call":
        """The same call on copies of what it is given."""
        args, kwargs = copied((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def run_until(self, enough: type[BaseException]) -> None:
        """Run the block for what is seen on the way, until that raises `enough`."""
        with suppress(enough):
            self.run()

    @property
    def hidden(self) -> Any:
        """What the block is to work on: its first argument."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


def copied(tree: Any) -> Any:
    """A copy of arguments: of tensors, and of objects that may hold some, such as a cache of keys and values."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return deepcopy(leaf) if hasattr(leaf, "__dict__") and not callable(leaf) else leaf

    return tree_map(copy, tree)


class Lane(threading.Thread):
    """One micro-batch on its way through `model.forward`.

    `call` is the block call that the lane waits in, None once the model has returned; then `output` is its output.
    `spill` takes its hidden state while memory is short.
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
        """The thread: runs the model; exceptions are carried to the thread that steps the lane."""
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
        """The call that the lane waits in, all in memory. Raises StructureError if the model has returned."""
        if self.call is None:
            raise StructureError("the lane has already passed the whole model")
        if self._spill is not None and self._is_spilled:
            self._spill.take(self.call.hidden, self._slot)
            self._is_spilled = False
        return self.call

    def wait_for(self, call: Call) -> Any:
        """From inside the lane: pause in `call` until it is answered, and return the answer."""
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
        """Answer the waiting call, and run up to the next block or the end."""
        self.call = None
        self._answers.put(output)
        self._until_paused()

    def step(self, by: nn.Module | None = None) -> None:
        """Run the block that the lane waits in, or what stands in its place, and go on to the next."""
        self.advance(self.waiting.run(by))

    def rehearse(self, run: Callable[[Call], R]) -> R:
        """Do something with a copy of the call that the lane waits in, and stay: what `run` gives."""
        given = run(self.waiting.copied())
        self._rest()
        return given

    def close(self) -> None:
        """End the lane wherever it stands; one that runs, as after Ctrl-C, ends at its next block."""
        self.call = None
        self._answers.put(_Closed())
        self.join()

    def _until_paused(self) -> None:
        self._paused.get()
        if self._failure is not None:
            raise self._failure
        self._rest()

    def _rest(self) -> None:
        """Let the hidden state wait on the disk if memory is short."""
        if self._spill is None or self.call is None or not self._spill.is_short:
            return
        hidden = self.call.hidden
        if isinstance(hidden, Tensor) and hidden.nbytes >= _WORTH_IT and hidden.device.type == "cpu":
            self._slot = self._spill.put(hidden, self._slot)
            self._is_spilled = True


class Lanes:
    """The micro-batches of a calibration set, standing before the same block.

    model: called once per lane. blocks: the modules to pause at. batches: keyword arguments of each call.
    spill: where hidden states wait while memory is short; None keeps all in memory.
    Use it as a context manager: on entry every lane runs up to its first block, on exit all are ended and the
    model's modules are as they were.
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
        """The block that every lane stands before; None once the model has returned in all of them.

        Raises StructureError if the model sent its micro-batches different ways.
        """
        standing = {
            id(lane.call.module): lane.call.module if lane.call else None for lane in self._lanes if lane.call
        }
        if not standing:
            return None
        if len(standing) > 1 or any(lane.call is None for lane in self._lanes):
            raise StructureError(
                "the model's path depends on its input: micro-batches stand before different blocks, so it cannot "
                "be calibrated block by block"
            )
        return next(iter(standing.values()))


def _pausing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, except that a lane which calls it waits for an answer instead."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        lane = threading.current_thread()
        if not isinstance(lane, Lane):
            return forward(*args, **kwargs)
        return lane.wait_for(Call(block, forward, args, kwargs))

    return paused


def batches_of(tokens: Tensor, batch_size: int) -> list[dict[str, Any]]:
    """Token ids (n, seq_len) as the keyword arguments of one model call per micro-batch of `batch_size` rows."""
    return [{"input_ids": rows, "use_cache": False} for rows in torch.split(tokens, batch_size)]
