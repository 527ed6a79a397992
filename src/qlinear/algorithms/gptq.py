"""GPTQ: weights are rounded column by column, and each error is made up for by the columns still to come.

Frantar et al. 2022 (GPTQ), in the form of Chee et al. 2023 (QuIP, theorem 6), which is the same algorithm and needs
no inverse. A layer's output error is a quadratic form in the weight's error E = W - Q, with H the mean of x xᵀ:

    loss = tr(E H Eᵀ)        H + ridge = (I + U) D (I + U)ᵀ,  U strictly upper triangular, D diagonal
         = Σ_k D_k |E_k + E_{<k} U_{<k,k}|²  - Σ_k ridge_k |E_k|²

Taken in order, term k is least when column k is rounded from its target W_k + E_{<k} U_{<k,k}. Columns with the
largest second moment go first, when all others are still there to make up for them (activation order). The grid is
fixed before that, so the codes of a group lie together as in any other checkpoint: no g_idx.

Where inputs are rounded as well, H is of the rounded ones, and what is rounded is the weight that fits them (`fit`).

The targets are gathered by halves: the left half of the columns is rounded, one matrix product brings its errors to
the right half, and so on inside each. All work but the rounding is in large products; at any depth it fits a cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NumericsError
from ..formats.rounding import QuantizedTensor, choose_qparams, require_finite
from ..formats.scheme import TensorFormat
from ..runtime.threads import on_each_core_or_here
from .base import Group
from .parts.cholesky import DAMPING, Factor, factorize
from .parts.clipping import least_error_qparams
from .parts.column_grid import FEW, ColumnGrid, by_halves
from .parts.coordinate_descent import Descent, row_losses
from .parts.input_error import fit_to_rounded_input

# Ranges to choose from: fewer than `grid.RATIOS`, since the descent moves the scales of groups on.
_RATIOS = (1.0, 15 / 14, 0.92, 0.84, 0.76)
# Elements of a weight that are worked on at once, as many of its rows as that makes: rows have nothing to do with
# each other, so each core takes some, and the working copies are several times as large as this.
_AT_ONCE = 1 << 25
# Rows that a thread must have to be worth its while: an operation on fewer numbers is over sooner than it is called,
# and threads that call wait for each other.
_TALL = 1 << 12


@dataclass(frozen=True, slots=True)
class Rounded:
    """What GPTQ made of one weight.

    damping: see `Factor`; None if the second moments could not be factorized, and the result is round to nearest.
    rows_kept: how many rows GPTQ left no better than rounded to nearest, which the descent then began with.
    """

    weight: QuantizedTensor
    damping: float | None
    rows_kept: int

    @property
    def fell_back(self) -> bool:
        """Whether nothing but round to nearest was possible."""
        return self.damping is None


def gptq(
    group: Group,
    *,
    damping: float = DAMPING,
    grid: Literal["least-error", "extremes"] = "least-error",
    sweeps: int = 2,
) -> dict[str, Rounded]:
    """Codes of each weight of a group, whose output error on the calibration inputs is never above round to nearest's.

    Where inputs are rounded, that is the error against the weight that fits them, as far as the fit is trusted (`fit`).

    group: with second moments, of the input or of what rounding makes of it, and smoothed already. damping: see
    `factorize`. grid: scales from `least_error_qparams`, or from the extremes of each tile. sweeps: of the descent that
    follows. Raises NumericsError, naming the weight, on NaN or infinity or without second moments, and SchemeError
    where the scheme does not fit.
    """
    first, halves = next(iter(group.weights)), group.rounded_input
    x = None if halves is None else halves[0] + halves[1]
    hessian = group.hessian if x is None else x.hessian
    if hessian is None:
        raise NumericsError(f"GPTQ needs the second moments of the input of {first}; the group has none")
    for name, weight in group.weights.items():
        require_finite(weight, name)
        if hessian.shape != (weight.shape[1],) * 2:
            raise NumericsError(
                f"moment must be (in, in) of {name} {tuple(weight.shape)}; got {tuple(hessian.shape)}"
            )
    factor = factorize(hessian, damping, first)
    aims = group.weights
    if halves is not None and x is not None and factor is not None:
        aims = fit_to_rounded_input(group.weights, halves, x, factor)

    def rounded(stack: Sequence[tuple[str, slice]]) -> tuple[QuantizedTensor, Tensor]:
        rows = _stacked(group.weights, stack)
        aim = rows if aims is group.weights else _stacked(aims, stack)
        return _round(rows, aim, group, hessian, factor, grid, sweeps)

    parts: dict[str, list[tuple[QuantizedTensor, int]]] = {name: [] for name in group.weights}
    tall = sum(len(weight) for weight in group.weights.values()) // _TALL
    with on_each_core_or_here(hessian.device, max_threads=tall) as cores:
        stacks = list(_stacks(group.weights, group.scheme.weight, cores.count))
        for stack, (found, kept) in zip(stacks, cores.map(rounded, stacks), strict=True):
            start = 0
            for name, rows in stack:
                part = slice(start, start := start + rows.stop - rows.start)
                parts[name].append((_rows(found, part, len(kept)), int(kept[part].sum())))
    used = None if factor is None else factor.damping
    return {
        name: Rounded(_joined([each for each, _ in made]), used, sum(kept for _, kept in made))
        for name, made in parts.items()
    }


def _stacks(
    weights: Mapping[str, Tensor], fmt: TensorFormat, cores: int
) -> Iterator[list[tuple[str, slice]]]:
    """Weights that share second moments as runs of rows to work on at once: a column of all is one vector then.

    All cores together hold `_AT_ONCE`, each the same share.
    """
    if fmt.granularity in ("tensor", "block"):  # rows share scales
        yield from ([(name, slice(0, len(weight)))] for name, weight in weights.items())
        return
    width, rows = next(iter(weights.values())).shape[1], sum(len(weight) for weight in weights.values())
    most = max(1, min(_AT_ONCE // max(1, width), rows) // cores)
    stack: list[tuple[str, slice]] = []
    height = 0
    for name, weight in weights.items():
        for start in range(0, len(weight), most):
            piece = slice(start, min(start + most, len(weight)))
            if stack and height + piece.stop - piece.start > most:
                yield stack
                stack, height = [], 0
            stack.append((name, piece))
            height += piece.stop - piece.start
    yield stack


def _stacked(weights: Mapping[str, Tensor], stack: Sequence[tuple[str, slice]]) -> Tensor:
    """Those rows of the weights as one."""
    pieces = [weights[name][rows] for name, rows in stack]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@torch.no_grad()  # which holds for a thread, and each core has its own
def _round(
    weight: Tensor,
    aim: Tensor,
    group: Group,
    hessian: Tensor,
    factor: Factor | None,
    grid: Literal["least-error", "extremes"],
    sweeps: int,
) -> tuple[QuantizedTensor, Tensor]:
    """Codes of a weight (out, in), and which rows (out,) GPTQ did not better. aim: what they are to come near to."""
    fmt, targets = group.scheme.weight, aim.T.contiguous()
    nearest = ColumnGrid.of(choose_qparams(weight, fmt, group.scale_dtype), fmt, weight.shape)
    steps = nearest.round_all_(_copied_columns(weight))
    if factor is None:
        return nearest.quantized(steps), torch.ones_like(weight[:, 0], dtype=torch.bool)
    rtn_losses = row_losses(nearest.values(steps).sub_(targets), hessian)
    found = nearest
    if grid == "least-error":
        qparams = least_error_qparams(aim, fmt, hessian.diagonal(), group.scale_dtype, _RATIOS)
        found = ColumnGrid.of(qparams, fmt, weight.shape)
    gradient, losses = _begin(targets, factor, found, out=steps)
    kept = losses > rtn_losses
    if fmt.granularity in ("tensor", "block"):  # rows share scales, and are kept or not together
        kept = (losses.sum() > rtn_losses.sum()).expand_as(kept)
    descent = Descent(targets, steps, gradient, found, hessian, group.scale_dtype)
    if bool(kept.any()):
        descent.restart(kept, nearest, nearest.round_all_(_copied_columns(weight)))
    descent.run(sweeps)
    return found.quantized(descent.steps), kept


def _copied_columns(weight: Tensor) -> Tensor:
    """A weight (out, in) as (in, out), to be worked on in place."""
    return weight.T.clone(memory_format=torch.contiguous_format)


def _begin(targets: Tensor, factor: Factor, grid: ColumnGrid, out: Tensor) -> tuple[Tensor, Tensor]:
    """What the descent begins with: the steps that GPTQ gives, in `out`; their gradient (in, out), and the loss of each
    row (out,)."""
    rest = _propagate(targets, factor, grid, out)
    values = grid.values(out)
    rest.sub_(values[factor.order])
    error = torch.sub(targets, values, out=values)
    gradient = factor.times(error, whitened=rest)
    return gradient, error.mul_(gradient).sum(0)


def _propagate(targets: Tensor, factor: Factor, grid: ColumnGrid, out: Tensor) -> Tensor:
    """Round each column from its target to steps on a grid that is given, in `out`; those targets (in, out), in the
    factor's order."""
    order, upper = factor.order.tolist(), factor.upper
    rest, errors = targets[factor.order], torch.empty_like(targets)
    exact, target, error, step = targets.unbind(), rest.unbind(), errors.unbind(), out.unbind()
    near = [upper.diagonal(distance).tolist() for distance in range(FEW)]

    def visit(start: int, stop: int) -> None:
        for column in range(start, stop):
            for before in range(start, column):
                target[column].add_(error[before], alpha=near[column - before][before])
            at = order[column]
            scale, here = grid.scales[at // grid.width], step[at]
            grid.round_(torch.div(target[column], scale, out=here), at)
            torch.addcmul(exact[at], here, scale, value=-1, out=error[column])

    def carry(done: slice, to: slice) -> None:
        rest[to].addmm_(upper[done, to].T, errors[done])

    by_halves(0, len(order), FEW, visit, carry)
    return rest


def _rows(weight: QuantizedTensor, part: slice, of: int) -> QuantizedTensor:
    """Some of the rows of a weight; all, where they share scales."""
    if part == slice(0, of):
        return weight
    zero_point = None if weight.zero_point is None else weight.zero_point[part]
    return QuantizedTensor(weight.codes[part], weight.scale[part], zero_point, weight.format)


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """A weight from runs of its rows."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None, parts[0].format,
    )  # fmt: skip
