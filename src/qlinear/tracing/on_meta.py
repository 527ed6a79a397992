"""Finds the input groups of a model whose parameters are on meta: one block of each kind runs with random weights.

Which weights share an input, and what produces it, does not depend on the weights' values.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..streaming.diagnose import diagnosing
from ..streaming.lanes import Lanes, batches_of
from ..streaming.random_weights import (
    TOKENS,
    dummy_ids,
    kind_of,
    longest,
    one_column_weights,
    one_run_per_kind,
    random_weights,
    short_dummy_ids,
)
from .folds import InputGroup, find_groups
from .proof import find_and_prove_folds

_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
# In-place operations that a model may apply to its weights; a weight of one repeated column cannot be written to.
_RESCALING = {Tensor.div_, Tensor.mul_}


def groups_on_meta(
    model: nn.Module, blocks: Mapping[str, nn.Module], head: nn.Module
) -> dict[str, list[InputGroup]]:
    """The input groups of every block that the model's forward runs, by the block's name.

    model: with its parameters on meta, in float32. Blocks whose parameters have the same names and shapes are of one
    kind; the first block of each kind is examined, and its groups are used for all.
    """
    name_of = {id(block): name for name, block in blocks.items()}
    kinds: dict[Any, tuple[list[InputGroup], list[Any]]] = {}
    groups_of: dict[str, list[InputGroup]] = {}
    stops = [*blocks.values(), head]
    shapes = (TOKENS, 1), (2, longest(model))
    batches = [batch for shape in shapes for batch in batches_of(dummy_ids(model, *shape), shape[0])]
    with (
        diagnosing(lambda: (model, blocks)),
        torch.no_grad(),
        _OneColumnProducts(),
        random_weights(_outside(model, stops)),
        Lanes(model, stops, batches) as lanes,
    ):
        while (block := lanes.at) is not None and block is not head:
            kind = kind_of(block)
            if kind not in kinds:
                kinds[kind] = _examine(block, lanes)
            groups, outputs = kinds[kind]
            groups_of[name_of[id(block)]] = groups
            for lane, output in zip(lanes, outputs, strict=True):
                lane.advance(output)
    return groups_of


def weights_used_as_floats(model: nn.Module, blocks: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of the linears whose weight the model needs as floats.

    Such a model casts an input to the weight's dtype, which for codes would be int8, or rescales the weight as it runs,
    as RWKV does. model: with its parameters on meta, in any dtype; changes that its forward makes to it stay. As in
    `groups_on_meta`, the first block of each kind stands for all.
    """
    kinds = {name: kind_of(block) for name, block in blocks.items()}
    first = {kind: name for name, kind in reversed(kinds.items())}
    with (
        diagnosing(lambda: (model, blocks)),
        torch.no_grad(),
        _OneColumnProducts(),
        random_weights(model.modules(), one_column_weights),
        _FloatWeightUse(model) as used,
        one_run_per_kind(blocks),
    ):
        model(short_dummy_ids(model), use_cache=False)
    examined = [(name, first[kind]) for name, kind in kinds.items()]
    return frozenset(used.names).union(
        name + linear.removeprefix(example)
        for name, example in examined
        for linear in used.names
        if linear.startswith(f"{example}.")
    )


class _FloatWeightUse(TorchFunctionMode):
    """Context manager: collects the names of linears whose weight's dtype is read, or whose weight is rescaled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
        self._names = {id(linear.weight): name for name, linear in linears}
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rescales = func in _RESCALING and args[0].dim() > 1 and args[0].stride(-1) == 0
        if (rescales or func == _DTYPE) and id(args[0]) in self._names:
            self.names.add(self._names[id(args[0])])
        return args[0] if rescales else func(*args, **(kwargs or {}))


class _OneColumnProducts(TorchFunctionMode):
    """Context manager: multiplies by a matrix of one repeated column as a sum and an outer product."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) > 1 and args[1].dim() == 2 and args[1].stride(-1) == 0:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            y = args[0].sum(-1, keepdim=True) * args[1][:, 0]
            return y if bias is None else y + bias
        return func(*args, **(kwargs or {}))


def _examine(block: nn.Module, lanes: Lanes) -> tuple[list[InputGroup], list[Any]]:
    """The groups of a block, and its output for each lane."""
    probe, proof = (lane.waiting for lane in lanes)
    with random_weights(block.modules()):
        trace, folds = find_and_prove_folds(block, probe, proof)
        return find_groups(trace, folds), [probe.run(), proof.run()]


def _outside(model: nn.Module, stops: list[nn.Module]) -> list[nn.Module]:
    """The modules that are in none of `stops`."""
    inside = {id(module) for stop in stops for module in stop.modules()}
    return [module for module in model.modules() if id(module) not in inside]
