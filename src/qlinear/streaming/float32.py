"""Part of a model run in float32, whatever dtype it is held in.

Folds are proved by comparing two runs, and a model's own bfloat16 noise can be larger than the error of a wrong fold.
So the tokens that prove folds pass in float32 through every block, and through what the model computes between blocks.
"""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .lanes import Call, Lane

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, type, nn.Module)


@contextmanager
def in_float32(tensors: Iterable[Tensor], private: bool = False) -> Iterator[None]:
    """Context manager: floating-point parameters and buffers are float32 copies; the originals are restored on exit.

    private: copy those that are in float32 already too, so that they may be changed. A model may hold a router in
    float32 and the rest in bfloat16.
    """
    floating = [t for t in tensors if t.is_floating_point() and not t.is_meta]
    originals = [(t, t.data) for t in floating if private or t.dtype != torch.float32]
    for tensor, data in originals:
        tensor.data = data.to(torch.float32, copy=True)
    try:
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def to_float32(tree: Any) -> Any:
    """Arguments with every floating-point tensor in float32.

    Lists, dicts and objects that hold tensors (a cache of keys and values) are changed in place, since the model keeps
    them between blocks; tuples are made anew.
    """
    return _cast(tree, set())


def _cast(tree: Any, seen: set[int]) -> Any:
    if isinstance(tree, Tensor):
        return tree.float() if tree.is_floating_point() and tree.dtype != torch.float32 else tree
    if isinstance(tree, _PLAIN) or callable(tree) or id(tree) in seen:
        return tree
    if isinstance(tree, tuple):
        members = [_cast(member, seen) for member in tree]
        return type(tree)(*members) if hasattr(tree, "_fields") else tuple(members)
    seen.add(id(tree))
    if isinstance(tree, list):
        tree[:] = [_cast(member, seen) for member in tree]
    elif isinstance(tree, dict | MutableMapping):
        for key, member in list(tree.items()):
            tree[key] = _cast(member, seen)
    for name, member in list(vars(tree).items()) if hasattr(tree, "__dict__") else []:
        cast = _cast(member, seen)
        if cast is not member:
            setattr(tree, name, cast)
    return tree


def float32_call(call: Call) -> Call:
    """The call that a lane waits in, with float32 arguments."""
    args, kwargs = to_float32((call.args, dict(call.kwargs)))
    return replace(call, args=args, kwargs=kwargs)


def step_in_float32(lane: Lane, block: nn.Module, between: Iterable[Tensor]) -> Any:
    """Let a lane pass a block, and what the model computes up to the next one, in float32; returns the block's output.

    between: the parameters that lie outside of the blocks.
    """
    with in_float32(tensors_of(block)):
        output = float32_call(lane.waiting).run()
    advance_in_float32(lane, output, between)
    return output


def is_narrow(module: nn.Module) -> bool:
    """Whether a module holds floating-point numbers in a dtype other than float32."""
    return any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors_of(module))


def advance_in_float32(lane: Lane, output: Any, between: Iterable[Tensor]) -> None:
    """Answer a lane's call; the model computes in float32 up to the next block."""
    with in_float32(between):
        lane.advance(output)
