"""Running a block with one thing changed: what a weight reads or gives is scaled, without touching the weight.

Powers of two make such a run exact, so whether two runs agree is not a question of tolerance. A run is written down as
a `Trace`, and can be replayed: then each product gives what it gave before, whatever reaches it. A change shows in what
reads it directly, and goes no further; and nothing is multiplied, so that such a run costs next to nothing.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..streaming.lanes import copied
from .trace import Operands, Watch, Weight

_TOPK = {torch.topk, Tensor.topk}
# What most arguments are that hold no tensor.
_NO_TENSORS = (int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication: x (tokens, in) as it reaches `weight`, and y (tokens, out), bias included.

    Both are as they are before any scaling that `observe` was asked for.
    source: a key that two products share if they read the very same tensor. made_from: the weights and vectors that
    x was computed from, by name, as far as the products before.
    """

    weight: Weight
    x: Tensor
    y: Tensor
    bias: str | None
    source: tuple[Any, ...]
    made_from: frozenset[str]


@dataclass(slots=True)
class Trace:
    """A block's run: its products in order, what it returned, and what left it another way.

    outputs: what each product gave, in order, to replay it. unread: as `Watch` has it.
    """

    products: list[Product] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    escaped: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[Weight, Tensor]] = field(default_factory=list)
    unread: frozenset[str] = frozenset()


Scales = Mapping[Weight, Tensor]


def observe(
    block: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    scale_input: Scales | None = None,
    scale_output: Scales | None = None,
    replay: Trace | None = None,
) -> Trace:
    """Run `forward(*args, **kwargs)` of `block` in float32 and write down what happened.

    The arguments are copied, so a run leaves no trace in the lane they were taken from. scale_input and
    scale_output multiply what a weight reads (in,) or gives (out,). replay: give what the products of that run gave.
    """
    args, kwargs = _float_copy(tuple(args)), _float_copy(dict(kwargs))
    watch = _Experiment(block, scale_input or {}, scale_output or {}, replay)
    with torch.no_grad(), watch:
        returned = forward(*args, **kwargs)
    trace = watch.trace
    trace.returned, trace.unread = _tensors(returned), frozenset(watch.unread)
    known = {id(t) for t in [*trace.returned, *_tensors((args, kwargs))]} | watch.views
    alive = {id(t): t for ref in watch.made if (t := ref()) is not None}
    del returned
    trace.escaped = [t for key, t in alive.items() if key not in known or key in _held(args, kwargs)]
    return trace


class _Experiment(Watch):
    """A run in which inputs and outputs of weights are scaled, and every expert gets its share of the tokens.

    made: everything that the block computed, to see afterwards what of it has escaped.
    """

    def __init__(self, block: nn.Module, inputs: Scales, outputs: Scales, replay: Trace | None) -> None:
        super().__init__(block, self._note)
        self._inputs, self._outputs = inputs, outputs
        self._replies = deque(replay.outputs if replay else ())
        self._origins = _Origins(block)
        self._read: list[Tensor] = []
        self.trace = Trace()
        self.made: list[weakref.ref[Tensor]] = []

    @property
    def views(self) -> set[int]:
        """The identities of the block's weights and of what was made of them alone."""
        return set(self._derived)

    def _note(self, weight: Weight, x: Tensor, y: Tensor, bias: str | None) -> None:
        source = (x.data_ptr(), x.shape, x.stride(), x._version)
        # As long as what was read lives, no other tensor has its address. An alias, for what escapes lives without us.
        self._read.append(x.detach())
        flat = x.reshape(-1, x.shape[-1]).detach().clone(), y.reshape(-1, y.shape[-1]).detach().clone()
        self.trace.products.append(Product(weight, *flat, bias, source, self._origins.of(x)))

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func in _TOPK:
            out = _routed(args[0] if args else kwargs["input"], out, args, kwargs)
        made = _tensors(out)
        self.made += [weakref.ref(t) for t in made]
        self._origins.follow(_tensors((args, *kwargs.values())), made or _tensors(args[:1]))
        return out

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Operands, weights: list[Weight]
    ) -> Tensor:
        y = self._reply(weights[0])
        if y is None:
            x = _scaled(found, weights, found.x, self._inputs)
            args = tuple(x if a is found.x else a for a in args)
            y = func(*args, **{k: x if a is found.x else a for k, a in kwargs.items()})
        self.trace.outputs.append((weights[0], y.detach().clone()))
        self._report(found, weights, y)
        y = _scaled(found, weights, y, self._outputs)
        self.made.append(weakref.ref(y))
        self._origins.begin(y, weights[0].name)
        return y

    def _reply(self, weight: Weight) -> Tensor | None:
        """What this product gave when it was recorded; None if it was not, or not at this point."""
        if not self._replies or self._replies[0][0] != weight:
            return None
        return self._replies.popleft()[1].clone()


def _scaled(found: Operands, weights: list[Weight], values: Tensor, scales: Scales) -> Tensor:
    """Input or output `values` of a product, times what `scales` has for its weight, or for each slice."""
    if scales.keys().isdisjoint(weights):
        return values
    rows = found.rows(values)
    one = torch.ones(rows.shape[-1])
    factors = torch.stack([scales.get(weight, one) for weight in weights]).to(values)
    return found.rows(rows * (factors.unsqueeze(1) if len(weights) > 1 else factors[0]))


class _Origins:
    """Which weights and vectors a tensor was computed from, as far back as the products that it came through.

    Kept by storage, so that views and what is written in place are followed too. A storage that is new to its
    function begins anew, whatever lay at its address before.
    """

    def __init__(self, block: nn.Module) -> None:
        self._names = {_address(p): frozenset({n}) for n, p in block.named_parameters() if p.dim() == 1}

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._names.get(_address(tensor), frozenset())

    def begin(self, tensor: Tensor, name: str) -> None:
        self._names[_address(tensor)] = frozenset({name})

    def follow(self, read: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Note that `made` was computed from `read`, or written into some of it."""
        names = frozenset().union(*(self.of(t) for t in read))
        for tensor in made:
            self._names[_address(tensor)] = names


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _routed(scores: Tensor, chosen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A router's choice, replaced by one that goes round all experts: an experiment must reach them all, and a
    change of scores must not send a token elsewhere."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    if dim not in (-1, scores.dim() - 1) or not chosen.indices.numel():
        return chosen
    count = chosen.indices.shape[-1]
    start = torch.arange(chosen.indices[..., 0].numel(), device=scores.device) * count
    round_robin = start.unsqueeze(1) + torch.arange(count, device=scores.device)
    indices = (round_robin % scores.shape[-1]).view(chosen.indices.shape)
    return type(chosen)((scores.gather(-1, indices), indices))


def _held(args: Any, kwargs: Any) -> set[int]:
    """Tensors that sit in containers which were passed in: where a block puts what later blocks read."""
    containers = [a for a in [*args, *kwargs.values()] if isinstance(a, (dict, list))]
    return {id(t) for t in _tensors(containers)}


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in a function's arguments or results; pytree alone would take as long as many a function."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, _NO_TENSORS):
        return []
    if isinstance(tree, (tuple, list)):
        return [tensor for each in tree for tensor in _tensors(each)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _float_copy(tree: Any) -> Any:
    """A copy of arguments, with their tensors in float32."""
    return tree_map(lambda leaf: leaf.float() if _is_float(leaf) else leaf, copied(tree))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
