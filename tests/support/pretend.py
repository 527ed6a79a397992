"""A device that is not there: its tensors hold their data on the CPU, say that they are elsewhere, and mind it.

    pretend = with_pretend_device()      torch.zeros(3, device="pretend") works from then on, in every thread

What a GPU refuses is refused: an operation on tensors of two devices, a tensor of it in numpy or safetensors. What a
GPU leaves to chance is made to fail: new memory is full of NaN, and copies on a stream other than the default one are
not done before somebody waits for them. Results are those of the CPU, bit for bit, as the CPU computes them.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
# Operations that take tensors of two devices: copies, and indexing, whose indices may lie on the CPU.
_COPIES = {aten.copy_.default, aten._to_copy.default}
_EMPTY = {aten.empty.memory_format, aten.empty_strided.default}
# What would else make its result by having an empty tensor grow.
_GROWING = ("arange", "arange.start", "arange.start_step")
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Stream:
    """Work that was asked for and may not have been done: all of it has only when somebody waits."""

    def __init__(self, device: object = None) -> None:
        self._waiting: list[Callable[[], object]] = []
        self._done = 0
        self._lock = threading.RLock()

    @property
    def asked(self) -> int:
        return self._done + len(self._waiting)

    def later(self, work: Callable[[], object]) -> None:
        self._waiting.append(work)

    def run_to(self, mark: int) -> None:
        with self._lock:
            while self._done < mark:
                self._waiting.pop(0)()
                self._done += 1

    def synchronize(self) -> None:
        self.run_to(self.asked)

    def wait_stream(self, other: "Stream") -> None:
        other.synchronize()


class Event:
    """A point in a stream's work."""

    def __init__(self) -> None:
        self._at: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self._at = stream, stream.asked

    def synchronize(self) -> None:
        if self._at is not None:
            self._at[0].run_to(self._at[1])


class Backend:
    """What `torch.cuda` is for CUDA: as much of it as is called."""

    Stream, Event = Stream, Event
    count = 2
    has_bfloat16 = True
    _default = Stream()
    _current = threading.local()

    def is_available(self) -> bool:
        return self.count > 0

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        assert 0 <= index < self.count

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        return self.has_bfloat16

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._current, "stream", self._default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


BACKEND = Backend()


class Pretend(Tensor):
    """A tensor on the device. raw: its data. lent: whether another stream was told that it uses the tensor."""

    raw: Tensor
    lent: bool
    calls: ClassVar[int] = 0

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor, index: int = 0) -> "Pretend":
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, index),
        )  # fmt: skip
        made.raw, made.lent = raw, False
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretend({self.raw!r})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        self.lent = True

    def tolist(self) -> Any:
        return self.raw.tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Pretend)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.raw = value.raw

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        Pretend.calls += 1
        kwargs = dict(kwargs or {})
        _require_one_device(func, args, kwargs)
        stream = BACKEND.current_stream()
        if func is aten.copy_.default and stream is not BACKEND._default:
            into, source = (a.raw if isinstance(a, Pretend) else a for a in args[:2])
            stream.later(lambda: into.copy_(source))
            return args[0]
        stream.synchronize()  # what was asked for before, in this stream
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Pretend)]
        held = {id(t.raw): t for t in leaves}
        target = kwargs.get("device") or leaves[0].device
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
        for leaf in leaves:
            assert leaf.shape == leaf.raw.shape, f"{func} changes a tensor's shape in place"
        return tree_map(functools.partial(_wrapped, held, torch.device(target)), out)


def _raw(leaf: Any) -> Any:
    return leaf.raw if isinstance(leaf, Pretend) else leaf


def _wrapped(held: dict[int, Pretend], target: torch.device, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or target.type == "cpu":
        return leaf
    return held[id(leaf)] if id(leaf) in held else Pretend(leaf, target.index or 0)


def _require_one_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a GPU refuses. As one operand of several a CPU tensor may be, if it is a mere number."""
    if func in _COPIES:
        return
    if func in _INDEXING:  # (self, indices, values)
        assert isinstance(args[0], Pretend), f"{func}: a CPU tensor was indexed with what is on the device"
        args = (args[0], *args[2:])
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away = [t for t in tensors if not isinstance(t, Pretend)]
    is_pointwise = torch.Tag.pointwise in func.tags and isinstance(tensors[0], Pretend)
    places = {t.device.index for t in tensors if isinstance(t, Pretend)}
    if len(places) > 1 or any(t.dim() > 0 or not is_pointwise for t in away):
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in tensors)
        raise AssertionError(f"{func} takes tensors of one device; got {shapes}")


def _on_no_tensor(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on no tensor of the device that makes one. New memory is not zero."""
    index = torch.device(kwargs["device"]).index or 0
    made = op(*args, **(kwargs | {"device": torch.device("cpu"), "pin_memory": None}))
    if op in _EMPTY and made.is_floating_point():
        made.fill_(torch.nan)
    elif op in _EMPTY and made.dtype != torch.bool:
        made.fill_(torch.iinfo(made.dtype).max)
    return Pretend(made, index)


def _dispatched(op: Any, *args: Any, **kwargs: Any) -> Any:
    return Pretend.__torch_dispatch__(op, (), args, kwargs)


@functools.cache
def with_pretend_device() -> Backend:
    """Have the device from now on."""
    _setup_privateuseone_for_python_backend(NAME, BACKEND)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_on_no_tensor, "PrivateUse1")
    factories = torch.library.Library("aten", "IMPL")
    for name in _GROWING:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        factories.impl(name, functools.partial(_on_no_tensor, op), "PrivateUse1")
    # torch's own code copies a list into a new tensor in a place where subclasses are not asked.
    factories.impl("copy_", functools.partial(_dispatched, aten.copy_.default), "PrivateUse1")
    BACKEND.libraries = library, factories  # type: ignore[attr-defined] # they are gone with their last reference
    return BACKEND
