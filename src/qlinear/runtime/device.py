"""Where a job computes: the processor, or an accelerator. The one file that knows what is different there.

A model is read on the host, and taken up to an accelerator block by block. That costs nothing where it happens while
the block before is worked on: on a stream of its own, from pinned memory, which the device reads by itself. Two pinned
buffers are enough, one being filled from the file while the other is on its way.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from itertools import cycle
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError

CPU = torch.device("cpu")
# The type of device that is known besides; on AMD's, torch calls it so too.
KIND = "cuda"
# Bytes of a pinned buffer: large enough for the bus, and whole elements of every dtype.
_CHUNK = 32 << 20


def as_device(name: str | torch.device) -> torch.device:
    """The device of that name, `cpu`, `cuda` or `cuda:N`, which becomes the current one of its kind.

    `cuda` is the first GPU; under torchrun each process has its own. Raises DeviceError if there is none such.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", KIND):
        raise DeviceError(f"device must be cpu, {KIND} or {KIND}:N; got {str(name)!r}")
    if device.type == "cpu":
        return CPU
    backend = torch.get_device_module(device)
    if not backend.is_available():
        raise DeviceError(
            f"device {str(name)!r} is not there: torch {torch.__version__} finds no GPU; install a driver and a "
            "build of torch for it, or use --device cpu"
        )
    index, count = _index(device), backend.device_count()
    if index >= count:
        last = "" if count == 1 else f" to {KIND}:{count - 1}"
        started = "" if device.index is not None else f", and torchrun started process {index} of this host"
        raise DeviceError(
            f"device {str(name)!r} is not there: this host has {KIND}:0{last}{started}; use one of these"
            + (f", or --nproc-per-node {count}" if started else "")
        )
    backend.set_device(index)  # where pinned memory and libraries' workspaces belong
    return torch.device(KIND, index)


def _index(device: torch.device) -> int:
    """The index that was asked for, or that of this process among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an accelerator multiplies in a half dtype by itself."""
    if dtype == torch.bfloat16:
        return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))
    return dtype == torch.float16


def moved(value: Any, device: torch.device) -> Any:
    """A value with the tensors in it, in dataclasses, dicts, lists and tuples, on the device; a dataclass is itself
    where there is none to move."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(each, device) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    own = {each.name: getattr(value, each.name) for each in fields(value)}
    there = {name: moved(each, device) for name, each in own.items()}
    return value if all(there[name] is own[name] for name in own) else replace(value, **there)


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """Inside, too little memory on the device is raised as a DeviceError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise DeviceError(
            f"{device} has too little memory ({reason}): use fewer or shorter sequences (--samples, --seq-len), a GPU "
            "with more, or --device cpu"
        ) from error


class Lift:
    """Takes tensors up to an accelerator while it computes. What it takes up may be used when `moving` is left."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._backend: Any = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        self._lock = Lock()
        self._buffers: Iterator[tuple[Tensor, Any]] | None = None

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, in whatever thread, tensors are taken up, and what is made on the device belongs to the lift.

        Memory that was given up before may still be read by work that is waiting: that comes first.
        """
        with self._lock:
            self._stream.wait_stream(self._backend.current_stream(self.device))
            with self._backend.stream(self._stream):
                yield
            self._stream.synchronize()

    def upload(
        self, fill: Callable[[memoryview, int], None], nbytes: int, dtype: torch.dtype, out: Tensor
    ) -> None:
        """Have `nbytes` of elements of `dtype` come into `out`, contiguous on the device, converted to its dtype there.

        fill: called with memory to fill, and how many bytes come before.
        """
        flat = out.view(-1)
        for start in range(0, nbytes, _CHUNK):
            buffer, sent = self._next()
            sent.synchronize()  # what was in it is up
            values = buffer[: min(_CHUNK, nbytes - start)]
            fill(values.numpy().data, start)
            values = values.view(dtype)
            place = flat[start // dtype.itemsize :][: len(values)]
            if dtype != out.dtype:
                values = values.to(self.device, non_blocking=True)
            place.copy_(values, non_blocking=True)
            sent.record(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were made on the lift's stream go to the one that computes, which may be using them when they
        are let go of."""
        for tensor in tensors:
            tensor.record_stream(self._backend.current_stream(self.device))

    def _next(self) -> tuple[Tensor, Any]:
        """The buffer that was on its way for longest, and what happens when it has arrived."""
        if self._buffers is None:
            self._buffers = cycle([(_pinned(_CHUNK), self._backend.Event()) for _ in range(2)])
        return next(self._buffers)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
