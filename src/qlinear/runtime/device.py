"""Where a job computes: the processor or an accelerator. No other module treats the two differently.

A model is read into host memory and uploaded to an accelerator block by block. The upload of a block overlaps with the
work on the preceding one: it runs on a stream of its own, from pinned memory. Two pinned buffers are enough: one is
filled from the file while the other is copied to the device.
"""

import functools
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
# Torch's name for GPUs, AMD's too.
GPU = "cuda"
# Bytes of a pinned buffer: enough to saturate the bus, and a multiple of every dtype's size.
_CHUNK = 32 << 20


def as_device(name: str | torch.device) -> torch.device:
    """The device with this name, `cpu`, `cuda` or `cuda:N`; a GPU becomes torch's current one.

    `cuda` is the first GPU; under torchrun, the GPU of this process's local rank. Raises DeviceError if the name is
    unknown or the device does not exist.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", GPU):
        raise DeviceError(f"device must be cpu, {GPU} or {GPU}:N; got {str(name)!r}")
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
        last = "" if count == 1 else f" to {GPU}:{count - 1}"
        started = "" if device.index is not None else f", and torchrun started process {index} of this host"
        raise DeviceError(
            f"device {str(name)!r} is not there: this host has {GPU}:0{last}{started}; use one of these"
            + (f", or --nproc-per-node {count}" if started else "")
        )
    backend.set_device(
        index
    )  # pinned memory and the libraries' workspaces are allocated for the current device
    return torch.device(GPU, index)


def _index(device: torch.device) -> int:
    """The requested index, or this process's local rank."""
    return int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index


def has_native_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has native matrix products in a half dtype, instead of emulating them in float32."""
    if device.type == "cpu":
        return _cpu_has_native_products(dtype)
    if dtype == torch.bfloat16:
        return bool(torch.get_device_module(device).is_bf16_supported(including_emulation=False))
    return dtype == torch.float16


@functools.cache
def _cpu_has_native_products(dtype: torch.dtype) -> bool:
    has = torch.cpu.get_capabilities()
    native = {
        torch.bfloat16: has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16"),
        torch.float16: has.get("amx_fp16") or has.get("fp16"),
    }
    return bool(native.get(dtype))


def moved(value: Any, device: torch.device) -> Any:
    """The value with all its tensors on the device, in dataclasses, dicts, lists and tuples too.

    A dataclass without tensors to move is returned as it is.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(item, device) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    values = {item.name: getattr(value, item.name) for item in fields(value)}
    moved_fields = {name: moved(item, device) for name, item in values.items()}
    return (
        value
        if all(moved_fields[name] is values[name] for name in values)
        else replace(value, **moved_fields)
    )


@contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """Context manager: turns an out-of-memory error of the device into a DeviceError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise DeviceError(
            f"{device} has too little memory ({reason}): use fewer or shorter sequences (--samples, --seq-len), a GPU "
            "with more, or --device cpu"
        ) from error


class Uploader:
    """Uploads tensors to an accelerator while it computes; they may be used after `uploading` exits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._backend: Any = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        self._lock = Lock()
        self._buffers: Iterator[tuple[Tensor, Any]] | None = None

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Context manager: copies and allocations on the device go to the upload stream, in any thread.

        The stream first waits for the current one, whose queued work may still read memory that was freed.
        """
        with self._lock:
            self._stream.wait_stream(self._backend.current_stream(self.device))
            with self._backend.stream(self._stream):
                yield
            self._stream.synchronize()

    def upload(
        self, fill: Callable[[memoryview, int], None], nbytes: int, dtype: torch.dtype, out: Tensor
    ) -> None:
        """Copy `nbytes` bytes of elements of `dtype` into `out`, a contiguous tensor on the device, in its own dtype.

        fill: called as fill(buffer, offset) to fill a buffer in host memory with the bytes from `offset` on.
        """
        flat = out.view(-1)
        for start in range(0, nbytes, _CHUNK):
            buffer, copied = self._next_buffer()
            copied.synchronize()  # its previous contents have been copied
            values = buffer[: min(_CHUNK, nbytes - start)]
            fill(values.numpy().data, start)
            values = values.view(dtype)
            target = flat[start // dtype.itemsize :][: len(values)]
            if dtype != out.dtype:
                values = values.to(self.device, non_blocking=True)
            target.copy_(values, non_blocking=True)
            copied.record(self._stream)

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Tell the allocator that the computing stream uses these tensors, which were made on the upload stream."""
        for tensor in tensors:
            tensor.record_stream(self._backend.current_stream(self.device))

    def _next_buffer(self) -> tuple[Tensor, Any]:
        """The buffer whose copy started first, and the event that marks the copy's end."""
        if self._buffers is None:
            self._buffers = cycle([(_pinned(_CHUNK), self._backend.Event()) for _ in range(2)])
        return next(self._buffers)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
