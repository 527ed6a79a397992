"""Runs a block with the input or output of some weights scaled, without changing the weights.

Scaling by powers of two is exact in floating point, so two runs can be compared without a tolerance.

A run is recorded as a `Trace` and can be replayed. In a replay every product returns its recorded output, whatever its
input. A change then shows in the weights that read it directly and goes no further, and the replay costs almost nothing
because it multiplies no matrices.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..streaming.float32 import to_float32
from ..streaming.lanes import copied
from .trace import Operands, ProductWatcher, Weight

_TOPK = {torch.topk, Tensor.topk}
# Types of most arguments without tensors: a shortcut around pytree.
_NO_TENSORS = (int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication: x (tokens, in) as it reaches `weight`, and y (tokens, out), bias included.

    x and y are recorded before any scaling that `observe` applies.
    source: a key that is equal for two products that read the same tensor. computed_from: names of the weights and
    vectors that x was computed from, back to the preceding products.
    """

    weight: Weight
    x: Tensor
    y: Tensor
    bias: str | None
    source: tuple[Any, ...]
    computed_from: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Computed:
    """A computed product: y, from the scaled input x and the addend (a bias). weight: a stack's first slice."""

    weight: Weight
    x: Tensor
    addend: Tensor | None
    y: Tensor

    def is_of(self, x: Tensor, addend: Tensor | None) -> bool:
        """Whether the product has these operands, bit for bit."""
        if (addend is None) != (self.addend is None) or not torch.equal(x, self.x):
            return False
        return addend is None or self.addend is None or torch.equal(addend, self.addend)


@dataclass(slots=True)
class Trace:
    """A run of a block: its products in order, the tensors it returned, and its side outputs.

    side_outputs: tensors that outlive the call without being returned (kept in an attribute or a shared dict).
    computed: each product in order, for a replay or for reuse. unread: see `ProductWatcher`.
    """

    products: list[Product] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    side_outputs: list[Tensor] = field(default_factory=list)
    computed: list["_Computed"] = field(default_factory=list)
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
    reuse: Trace | None = None,
) -> Trace:
    """Run `forward(*args, **kwargs)` of `block` in float32 and record it.

    The arguments are copied, so the caller's tensors and containers do not change. scale_input, scale_output: factors
    for a weight's input (in,) or output (out,). replay: return the outputs of this recorded run's products.
    reuse: a recorded run with the same weights; a product with the same operands, bit for bit, is not computed again.
    """
    args, kwargs = to_float32(copied((tuple(args), dict(kwargs))))
    watch = _Experiment(block, scale_input or {}, scale_output or {}, replay, reuse)
    with torch.no_grad(), watch:
        returned = forward(*args, **kwargs)
    trace = watch.trace
    trace.returned, trace.unread = _tensors(returned), frozenset(watch.unread)
    known = {id(t) for t in [*trace.returned, *_tensors((args, kwargs))]} | watch.views
    alive = {id(t): t for ref in watch.created if (t := ref()) is not None}
    del returned
    trace.side_outputs = [
        t for key, t in alive.items() if key not in known or key in _in_containers(args, kwargs)
    ]
    return trace


class _Experiment(ProductWatcher):
    """A run with scaled inputs and outputs of weights, and with tokens spread evenly over all experts.

    created: weak references to every computed tensor; the ones still alive after the run are side outputs.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: Scales,
        outputs: Scales,
        replay: Trace | None,
        reuse: Trace | None = None,
    ) -> None:
        super().__init__(block, self._note)
        self._inputs, self._outputs = inputs, outputs
        self._replay = deque(replay.computed if replay else ())
        self._reuse = deque(reuse.computed if reuse else ())
        self._provenance = _Provenance(block)
        self._read: list[Tensor] = []
        self.trace = Trace()
        self.created: list[weakref.ref[Tensor]] = []

    @property
    def views(self) -> set[int]:
        """The ids of the block's weights and of tensors made from one weight alone."""
        return set(self._derived)

    def _note(self, weight: Weight, x: Tensor, y: Tensor, bias: str | None) -> None:
        source = (x.data_ptr(), x.shape, x.stride(), x._version)
        # Keeps the storage alive, so that no other tensor gets its address. An alias, so that the tensor itself still
        # dies when the block drops it and is not taken for a side output.
        self._read.append(x.detach())
        flat = x.reshape(-1, x.shape[-1]).detach().clone(), y.reshape(-1, y.shape[-1]).detach().clone()
        self.trace.products.append(Product(weight, *flat, bias, source, self._provenance.of(x)))

    def _other_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func in _TOPK:
            out = _round_robin_routing(args[0] if args else kwargs["input"], out, args, kwargs)
        results = _tensors(out)
        self.created += [weakref.ref(t) for t in results]
        self._provenance.follow(_tensors((args, *kwargs.values())), results or _tensors(args[:1]))
        return out

    def _product(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Operands,
        weights: list[Weight],
    ) -> Tensor:
        recorded = _next_of(self._replay, weights[0])
        y = self._compute(func, args, kwargs, operands, weights) if recorded is None else recorded.y.clone()
        self._report(operands, weights, y)
        y = _scaled(operands, weights, y, self._outputs)
        self.created.append(weakref.ref(y))
        self._provenance.set_from(y, weights[0].name)
        return y

    def _compute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Operands,
        weights: list[Weight],
    ) -> Tensor:
        """The product with its input scaled, recorded for another run."""
        x = _scaled(operands, weights, operands.x, self._inputs)
        addend = operands.bias if isinstance(operands.bias, Tensor) else None
        known = _next_of(self._reuse, weights[0])
        if known is not None and known.is_of(x, addend):
            self.trace.computed.append(known)
            return known.y.clone()
        args = tuple(x if a is operands.x else a for a in args)
        before = x.detach().clone(), None if addend is None else addend.detach().clone()
        y: Tensor = func(*args, **{k: x if a is operands.x else a for k, a in kwargs.items()})
        self.trace.computed.append(_Computed(weights[0], *before, y.detach().clone()))
        return y


def _next_of(recorded: deque[_Computed], weight: Weight) -> _Computed | None:
    """The next recorded product, removed, if it is one of `weight`; else None."""
    return recorded.popleft() if recorded and recorded[0].weight == weight else None


def _scaled(operands: Operands, weights: list[Weight], values: Tensor, scales: Scales) -> Tensor:
    """A product's input or output, times the factor in `scales` of its weight, or of each slice."""
    if scales.keys().isdisjoint(weights):
        return values
    rows = operands.rows(values)
    one = torch.ones(rows.shape[-1])
    factors = torch.stack([scales.get(weight, one) for weight in weights]).to(values)
    return operands.rows(rows * (factors.unsqueeze(1) if len(weights) > 1 else factors[0]))


class _Provenance:
    """Tracks which weights and vectors a tensor was computed from, back to the preceding products.

    Names are kept per storage, so that views and in-place writes are followed. A function's new storage gets the names
    of its inputs, whatever storage had the same address before.
    """

    def __init__(self, block: nn.Module) -> None:
        self._names = {_address(p): frozenset({n}) for n, p in block.named_parameters() if p.dim() == 1}

    def of(self, tensor: Tensor) -> frozenset[str]:
        return self._names.get(_address(tensor), frozenset())

    def set_from(self, tensor: Tensor, name: str) -> None:
        self._names[_address(tensor)] = frozenset({name})

    def follow(self, inputs: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Record that `results` were computed from `inputs`, or written into a tensor of them."""
        names = frozenset().union(*(self.of(t) for t in inputs))
        for tensor in results:
            self._names[_address(tensor)] = names


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _round_robin_routing(scores: Tensor, chosen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A router's top-k choice, replaced by a round robin over all experts.

    An experiment must reach every expert, and a change of scores must not send a token to another one.
    """
    dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    if dim not in (-1, scores.dim() - 1) or not chosen.indices.numel():
        return chosen
    count = chosen.indices.shape[-1]
    start = torch.arange(chosen.indices[..., 0].numel(), device=scores.device) * count
    round_robin = start.unsqueeze(1) + torch.arange(count, device=scores.device)
    indices = (round_robin % scores.shape[-1]).view(chosen.indices.shape)
    return type(chosen)((scores.gather(-1, indices), indices))


def _in_containers(args: Any, kwargs: Any) -> set[int]:
    """The ids of tensors in containers among the arguments: a block may leave values there for later blocks."""
    containers = [a for a in [*args, *kwargs.values()] if isinstance(a, (dict, list))]
    return {id(t) for t in _tensors(containers)}


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in a function's arguments or results, with shortcuts: pytree alone is slow."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, _NO_TENSORS):
        return []
    if isinstance(tree, (tuple, list)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
