"""Watching a block run: every product of an activation with one of its weights.

A weight is whatever multiplies: an `nn.Linear`'s, a transposed one, one expert's slice of a stack, a raw parameter
in a matmul. A torch function mode sees them all alike. It can also answer "what if": scale what a weight
reads or what it produces, without touching the weight. Powers of two make such a run exact, so whether two runs
agree is not a question of tolerance.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

# (activation, weight) among the arguments of torch's products, and the weight's layout there.
_OUT_IN = {F.linear}
_IN_OUT = {
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
}  # fmt: skip
_TOPK = {torch.topk, Tensor.topk}
_BIAS_FIRST = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix that multiplies: a parameter of the block, or slice `index` of a stack of them.

    transposed: stored as (in, out) rather than (out, in).
    """

    name: str
    transposed: bool = False
    index: int | None = None

    def of(self, block: nn.Module) -> Tensor:
        """The matrix itself as (out, in), a view of the block's parameter."""
        parameter = block.get_parameter(self.name)
        matrix = parameter if self.index is None else parameter[self.index]
        return matrix.mT if self.transposed else matrix

    @property
    def module(self) -> str:
        """The module that owns it, by its name in the block."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Product:
    """One multiplication: x (tokens, in) as it reaches `weight`, and y (tokens, out), bias included.

    Both are as they are before any scaling that `observe` was asked for.
    source: a key that two products share if they read the very same tensor.
    """

    weight: Weight
    x: Tensor
    y: Tensor
    bias: str | None
    source: tuple[Any, ...]


@dataclass(slots=True)
class Trace:
    """A block's run: its products in order, what it returned, and what left it another way."""

    products: list[Product] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    escaped: list[Tensor] = field(default_factory=list)


Scales = Mapping[Weight, Tensor]


class _Watch(TorchFunctionMode):
    """Reports each product to `on_product(weight, x, y, bias)`."""

    def __init__(
        self, block: nn.Module, on_product: Callable[[Weight, Tensor, Tensor, str | None], None]
    ) -> None:
        super().__init__()
        self._on_product = on_product
        self._names = {id(p): name for name, p in block.named_parameters()}
        self._parameters = {name: p for name, p in block.named_parameters() if p.dim() in (2, 3)}
        # What a parameter was turned into by functions of it alone (views, slices, casts): id -> (tensor, name,
        # which slice of a stack).
        self._derived: dict[int, tuple[Tensor, str, int | None]] = {
            id(p): (p, name, None) for name, p in self._parameters.items()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _operands(func, args, kwargs)
        if operands is not None and id(operands[1]) in self._derived:
            x, matrix, bias = operands
            return self._product(func, args, kwargs, x, self._weight(func, matrix), bias)
        out = self._other(func, args, kwargs)
        if isinstance(out, Tensor):
            self._derive(func, out, args)
        return out

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, weight: Weight, bias: Any
    ) -> Tensor:
        y: Tensor = func(*args, **kwargs)
        self._report(weight, x, y, bias)
        return y

    def _report(self, weight: Weight, x: Tensor, y: Tensor, bias: Any) -> None:
        """Tell of a product; of a batch of them, with a stack of weights, slice by slice."""
        name = self._names.get(id(bias))
        if not self._is_batch(weight, x):
            self._on_product(weight, x, y, name)
            return
        for index in range(x.shape[0]):
            self._on_product(replace(weight, index=index), x[index], y[index], name)

    def _is_batch(self, weight: Weight, x: Tensor) -> bool:
        parameter = self._parameters[weight.name]
        return (
            weight.index is None
            and parameter.dim() == 3
            and x.dim() == 3
            and x.shape[0] == parameter.shape[0]
        )

    def _derive(self, func: Any, out: Tensor, args: tuple[Any, ...]) -> None:
        if not args or id(args[0]) not in self._derived or id(out) in self._derived:
            return
        _, name, index = self._derived[id(args[0])]
        if func is Tensor.__getitem__ and args[0].dim() == 3 and out.dim() == 2:
            index = int(args[1])
        elif any(isinstance(other, Tensor) for other in args[1:]):
            return
        self._derived[id(out)] = (out, name, index)

    def _weight(self, func: Any, matrix: Tensor) -> Weight:
        _, name, index = self._derived[id(matrix)]
        row_major = matrix.stride(-1) <= matrix.stride(-2)
        return Weight(name, transposed=row_major != (func in _OUT_IN), index=index)


class _Experiment(_Watch):
    """A run in which inputs and outputs of weights are scaled, and every expert gets its share of the tokens.

    made: everything that the block computed, to see afterwards what of it has escaped.
    """

    def __init__(
        self,
        block: nn.Module,
        on_product: Callable[[Weight, Tensor, Tensor, str | None], None],
        scale_input: Scales,
        scale_output: Scales,
        frozen: bool,
    ) -> None:
        super().__init__(block, on_product)
        self._inputs, self._outputs, self._frozen = scale_input, scale_output, frozen
        self.made: list[weakref.ref[Tensor]] = []

    @property
    def views(self) -> set[int]:
        """The identities of the block's weights and of what was made of them alone."""
        return set(self._derived)

    def _other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if func in _TOPK:
            out = _routed(args[0] if args else kwargs["input"], out, args, kwargs, self._frozen)
        self.made += [weakref.ref(t) for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        return out

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, weight: Weight, bias: Any
    ) -> Tensor:
        scaled = self._scaled(weight, x, x, self._inputs)
        args = tuple(scaled if a is x else a for a in args)
        kwargs = {k: scaled if a is x else a for k, a in kwargs.items()}
        y: Tensor = func(*args, **kwargs)
        self._report(weight, x, y, bias)
        y = self._scaled(weight, x, y, self._outputs)
        self.made.append(weakref.ref(y))
        return y

    def _scaled(self, weight: Weight, x: Tensor, values: Tensor, scales: Scales) -> Tensor:
        """Input or output `values` of a product, times what `scales` has for its weight, or for each slice."""
        if weight in scales:
            return values * scales[weight].to(values)
        if not self._is_batch(weight, x):
            return values
        slices = (replace(weight, index=index) for index in range(x.shape[0]))
        one = torch.ones(values.shape[-1])
        return values * torch.stack([scales.get(w, one) for w in slices]).unsqueeze(1).to(values)


def _routed(scores: Tensor, chosen: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frozen: bool) -> Any:
    """A router's choice, replaced by one that goes round all experts: an experiment must reach them all, and a
    change of scores must not send a token elsewhere. frozen: nor may it change how much an expert counts."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    if dim not in (-1, scores.dim() - 1):
        return chosen
    count = chosen.indices.shape[-1]
    start = torch.arange(chosen.indices[..., 0].numel(), device=scores.device) * count
    round_robin = start.unsqueeze(1) + torch.arange(count, device=scores.device)
    indices = (round_robin % scores.shape[-1]).view(chosen.indices.shape)
    values = torch.full_like(chosen.values, 1 / count) if frozen else scores.gather(-1, indices)
    return type(chosen)((values, indices))


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Any] | None:
    """(activation, weight, bias) if `func` is one of torch's products, else None."""
    if func in _OUT_IN:
        x = args[0] if args else kwargs["input"]
        matrix = args[1] if len(args) > 1 else kwargs["weight"]
        return x, matrix, args[2] if len(args) > 2 else kwargs.get("bias")
    if func in _IN_OUT and len(args) > 1:
        return args[0], args[1], None
    if func in _BIAS_FIRST and len(args) > 2:
        return args[1], args[2], args[0]
    return None


@contextmanager
def watching(block: nn.Module, on_product: Callable[[Weight, Tensor], None]) -> Iterator[None]:
    """While open, `on_product(weight, x)` is called for every product of the block; x is (tokens, in)."""
    with _Watch(block, lambda weight, x, y, bias: on_product(weight, x.reshape(-1, x.shape[-1]))):
        yield


def observe(
    block: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    scale_input: Scales | None = None,
    scale_output: Scales | None = None,
    frozen: bool = False,
) -> Trace:
    """Run `forward(*args, **kwargs)` of `block` in float32 and write down what happened.

    The arguments are copied, so a run leaves no trace in the lane they were taken from. scale_input and
    scale_output multiply what a weight reads (in,) or gives (out,). frozen: routers weigh all experts alike.
    """
    args, kwargs = _float_copy(tuple(args)), _float_copy(dict(kwargs))
    trace = Trace()

    def note(weight: Weight, x: Tensor, y: Tensor, bias: str | None) -> None:
        source = (x.data_ptr(), x.shape, x.stride(), x._version)
        # Detached aliases share the memory but not the identity: an escaped tensor is one that lives without us.
        flat = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        trace.products.append(Product(weight, *flat, bias, source))

    watch = _Experiment(block, note, scale_input or {}, scale_output or {}, frozen)
    with torch.no_grad(), watch:
        returned = forward(*args, **kwargs)
    trace.returned = _tensors(returned)
    known = {id(t) for t in [*trace.returned, *_tensors((args, kwargs))]} | watch.views
    alive = {id(t): t for ref in watch.made if (t := ref()) is not None}
    del returned
    trace.escaped = [t for key, t in alive.items() if key not in known or key in _held(args, kwargs)]
    return trace


def _held(args: Any, kwargs: Any) -> set[int]:
    """Tensors that sit in containers which were passed in: where a block puts what later blocks read."""
    containers = [a for a in [*args, *kwargs.values()] if isinstance(a, (dict, list))]
    return {id(t) for t in _tensors(containers)}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _float_copy(tree: Any) -> Any:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.float().clone() if tensor.is_floating_point() else tensor.clone()

    return tree_map_only(Tensor, copy, tree)
