"""Records every product of an activation with a weight of a block, while the block runs.

A weight is any parameter that multiplies: an `nn.Linear`'s, a transposed one, one expert's slice of a stack, or a raw
parameter in a matmul, on either side. A torch function mode intercepts all of them in the same way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Torch's products, sorted by the weight's position among the arguments and its layout.
_LINEAR = {F.linear}
_MATMUL = {
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
}  # fmt: skip
_BIAS_FIRST = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}
# Products that may be a linear layer, or may do more than one.
_OTHERS = {torch.einsum, torch.tensordot, torch.inner, Tensor.inner, F.bilinear}


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix that multiplies: a parameter of the block, or slice `index` of a stack of them.

    transposed: stored as (in, out) rather than (out, in). slices: number of slices along the first dimension, where
    the model views a two-dimensional parameter as a stack.
    """

    name: str
    transposed: bool = False
    index: int | None = None
    slices: int | None = None

    def of(self, block: nn.Module) -> Tensor:
        """The matrix (out, in), as a view of the block's parameter."""
        parameter = block.get_parameter(self.name)
        stack = parameter if self.slices is None else parameter.view(self.slices, -1, parameter.shape[-1])
        matrix = stack if self.index is None else stack[self.index]
        return matrix.mT if self.transposed else matrix

    def count(self, block: nn.Module) -> int:
        """Number of slices in this weight's stack."""
        return self.slices or len(block.get_parameter(self.name))

    @property
    def module(self) -> str:
        """Name, in the block, of the module that owns the parameter."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Operands:
    """The operands of a product.

    left: the product is matrix · x, so x and the result hold tokens along their last axis. out_in: the matrix is stored
    as (out, in).
    """

    x: Tensor
    matrix: Tensor
    bias: Any = None
    left: bool = False
    out_in: bool = False

    def rows(self, values: Tensor) -> Tensor:
        """Converts x or the product to (..., tokens, channels), and back."""
        return values.mT if self.left else values


class ProductWatcher(TorchFunctionMode):
    """Context manager: calls `on_product(weight, x, y, bias)` for each product.

    unread: names of parameters that multiply in another way than a linear layer does. These are not reported.
    """

    def __init__(
        self, block: nn.Module, on_product: Callable[[Weight, Tensor, Tensor, str | None], None]
    ) -> None:
        super().__init__()
        self._on_product = on_product
        self.unread: set[str] = set()
        self._names = {id(p): name for name, p in block.named_parameters()}
        self._parameters = {name: p for name, p in block.named_parameters() if p.dim() in (2, 3)}
        # Parameters, and tensors made from one parameter alone (views, slices, casts): id -> (tensor, its weight).
        self._derived: dict[int, tuple[Tensor, Weight]] = {
            id(p): (p, Weight(name)) for name, p in self._parameters.items()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = self._operands(func, args, kwargs)
        if operands is not None:
            return self._product(func, args, kwargs, operands, self._weights(operands))
        if func in _MATMUL | _BIAS_FIRST | _OTHERS:
            factors = (t for t in tree_leaves((args, kwargs)) if id(t) in self._derived and t.dim() > 1)
            self.unread |= {self._derived[id(factor)][1].name for factor in factors}
        out = self._other_call(func, args, kwargs)
        if isinstance(out, Tensor):
            self._derive(func, out, args)
        return out

    def _operands(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands | None:
        """The operands, if `func` multiplies an activation by a weight of the block."""
        known = (o for o in _possible_operands(func, args, kwargs) if id(o.matrix) in self._derived)
        return next((o for o in known if o.matrix.dim() > 1 and (o.x.dim() > 1 or not o.left)), None)

    def _other_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _product(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Operands,
        weights: list[Weight],
    ) -> Tensor:
        y: Tensor = func(*args, **kwargs)
        self._report(operands, weights, y)
        return y

    def _report(self, operands: Operands, weights: list[Weight], y: Tensor) -> None:
        """Report a product; a batched product with a stack of weights is reported slice by slice."""
        name, x, y = self._names.get(id(operands.bias)), operands.rows(operands.x), operands.rows(y)
        if len(weights) == 1:
            self._on_product(weights[0], x, y, name)
            return
        for i, weight in enumerate(weights):
            self._on_product(weight, x[i], y[i], name)

    def _derive(self, func: Any, out: Tensor, args: tuple[Any, ...]) -> None:
        if not args or id(args[0]) not in self._derived or id(out) in self._derived:
            return
        _, weight = self._derived[id(args[0])]
        if func is Tensor.__getitem__ and args[0].dim() == 3 and out.dim() == 2:
            weight = replace(self._as_stack(weight, args[0]), index=int(args[1]))
        elif any(isinstance(other, Tensor) for other in args[1:]):
            return
        self._derived[id(out)] = (out, weight)

    def _as_stack(self, weight: Weight, matrix: Tensor) -> Weight:
        """The weight with `slices` set, if the model views a two-dimensional parameter as a stack."""
        is_view = self._parameters[weight.name].dim() == 2 and matrix.dim() == 3
        return replace(weight, slices=matrix.shape[0]) if is_view else weight

    def _weights(self, operands: Operands) -> list[Weight]:
        """The factor of a product: one weight, or a stack's slices, one per element of the batch."""
        _, weight = self._derived[id(operands.matrix)]
        row_major = operands.matrix.stride(-1) <= operands.matrix.stride(-2)
        weight = replace(self._as_stack(weight, operands.matrix), transposed=row_major != operands.out_in)
        shapes = operands.x.shape, operands.matrix.shape
        is_batch = weight.index is None and all(len(s) == 3 for s in shapes) and shapes[0][0] == shapes[1][0]
        return [replace(weight, index=i) for i in range(shapes[1][0])] if is_batch else [weight]


def _possible_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Operands]:
    """Possible interpretations of a call as activation times weight; empty if the call is no product."""
    if func in _LINEAR:
        x = args[0] if args else kwargs["input"]
        matrix = args[1] if len(args) > 1 else kwargs["weight"]
        yield Operands(x, matrix, args[2] if len(args) > 2 else kwargs.get("bias"), out_in=True)
    elif func in _MATMUL and len(args) > 1:
        yield Operands(args[0], args[1])
        yield Operands(args[1], args[0], left=True, out_in=True)
    elif func in _BIAS_FIRST and len(args) > 2:
        yield Operands(args[1], args[2], args[0])
    elif func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
        for x, matrix in ((1, 2), (2, 1)):
            out_in = _as_linear(args[0], x, matrix)
            if out_in is not None:
                yield Operands(args[x], args[matrix], out_in=out_in)


def _as_linear(equation: str, x: int, matrix: int) -> bool | None:
    """True if an einsum is x times a matrix stored (out, in), as "bti,oi->bto" is.

    False if the matrix is stored (in, out); None if the einsum is no linear layer.
    """
    inputs, _, out = equation.replace(" ", "").partition("->")
    names = ["", *inputs.split(",")]
    tokens, ends = names[x][:-1], {names[x][-1:] + out[-1:]: False, out[-1:] + names[x][-1:]: True}
    known = out[:-1] == tokens and not set(names[matrix]) & set(tokens) and len(set(names[matrix])) == 2
    return ends.get(names[matrix]) if known else None


class _InputWatcher(ProductWatcher):
    """Context manager: calls `on_input(weight, x)` before each product."""

    def __init__(self, block: nn.Module, on_input: Callable[[Weight, Tensor], None]) -> None:
        super().__init__(block, lambda weight, x, y, bias: None)
        self._on_input = on_input

    def _product(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Operands,
        weights: list[Weight],
    ) -> Tensor:
        x = operands.rows(operands.x)
        for i, weight in enumerate(weights):
            rows = x if len(weights) == 1 else x[i]
            self._on_input(weight, rows.reshape(-1, rows.shape[-1]))
        y: Tensor = func(*args, **kwargs)
        return y


@contextmanager
def watching_inputs(block: nn.Module, on_input: Callable[[Weight, Tensor], None]) -> Iterator[None]:
    """Context manager: calls `on_input(weight, x)` before every product of the block; x is (tokens, in)."""
    with _InputWatcher(block, on_input):
        yield
