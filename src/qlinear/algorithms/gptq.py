"""GPTQ: weights are rounded column by column, and each error is compensated by the columns that follow.

The objective
    Frantar et al. 2022 (GPTQ), in the form of Chee et al. 2023 (QuIP, theorem 6), which is the same algorithm and needs
    no inverse. The output error of a layer is a quadratic form in the weight error E = W - Q, with H the mean of x xᵀ:

        loss = tr(E H Eᵀ)        H + ridge = (I + U) D (I + U)ᵀ,  U strictly upper triangular, D diagonal
             = Σ_k D_k |E_k + E_{<k} U_{<k,k}|²  - Σ_k ridge_k |E_k|²

    In this order, term k is least when column k is rounded from its target W_k + E_{<k} U_{<k,k}.

The order
    Columns with the largest hessian diagonal go first (activation order), while all others can still compensate them.
    The grid is fixed before, so the codes of a group lie together as in any other checkpoint: no g_idx.

The steps for each weight
    1. Where inputs are rounded too, H is that of the rounded inputs, and the weight is first fitted to them
       (`parts.input_error`; the idea of GPTAQ, Li et al. 2025).
    2. Scales of least error are searched (`parts.clipping`).
    3. Columns are rounded in order, here.
    4. A row that came out no better than round to nearest starts from round to nearest instead.
    5. Codes and scales descend further, one at a time (`parts.coordinate_descent`).
    Steps 4 and 5 are not in the paper. With them the loss is never above that of round to nearest.

The speed
    Targets are collected by halves: the left half of the columns is rounded, one matrix product carries its errors to
    the right half, and each half is treated the same way. All work but the rounding is in large products, and every
    depth fits some cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericsError
from ..formats.finite import require_finite
from ..formats.rounding import QuantizedTensor, choose_qparams
from ..formats.scheme import TensorFormat
from ..runtime.threads import on_each_core_or_here
from .base import Algorithm, Codes, Group
from .parts.cholesky import DAMPING, Factor, factorize
from .parts.clipping import least_error_qparams
from .parts.column_grid import FEW, ColumnGrid, by_halves
from .parts.coordinate_descent import Descent, row_losses
from .parts.input_error import fit_to_rounded_input
from .rtn import RoundToNearest

# Ranges that a tile may choose from. Fewer than `clipping.RATIOS`, since the descent moves the scales of groups
# further.
_RATIOS = (1.0, 15 / 14, 0.92, 0.84, 0.76)
# How often the descent visits every column.
_SWEEPS = 2
# Weight elements in work at once, over all cores. Rows are independent, so each core takes some of them; the working
# copies are several times this size.
_AT_ONCE = 1 << 25
# Minimum rows per thread. Below this, call overhead dominates, and threads wait for each other.
_ROWS_PER_THREAD = 1 << 12
# A damping above this is reported: the first attempt, `DAMPING`, was not enough.
_NOTABLE_DAMPING = 1.1 * DAMPING


@dataclass(frozen=True, slots=True)
class GptqResult:
    """The codes of one weight.

    damping: see `Factor`; None if the hessian could not be factorized, and the result is round to nearest. rows_kept:
    how many rows started the descent from round to nearest, because GPTQ was no better there.
    """

    weight: QuantizedTensor
    damping: float | None
    rows_kept: int

    @property
    def fell_back(self) -> bool:
        """Whether the result is round to nearest, for want of a factor."""
        return self.damping is None

    @property
    def note(self) -> str | None:
        """What a user should know of the result."""
        if self.damping is None:
            return "its second moments could not be factorized: rounded to nearest"
        if self.damping > _NOTABLE_DAMPING:
            return (
                f"its second moments needed damping of {self.damping:.2g}: more calibration data would help"
            )
        return None


class Gptq(Algorithm):
    """`--algorithm gptq`; round to nearest where a group has no hessian."""

    name = "gptq"
    needs = frozenset({"hessian", "rounded_input"})

    def quantize(self, group: Group) -> dict[str, Codes]:
        """Codes of every weight; see `quantize_columns`."""
        if group.hessian is None and group.rounded_input is None:
            return RoundToNearest().quantize(group)
        return {name: Codes(result.weight, result.note) for name, result in quantize_columns(group).items()}


def quantize_columns(group: Group, damping: float = DAMPING) -> dict[str, GptqResult]:
    """Codes of each weight of a group; their output error on the calibration inputs is at most round to nearest's.

    Where inputs are rounded, the error is measured against the weight that fits the rounded inputs, as far as that fit
    is trusted (`fit_to_rounded_input`).

    group: smoothed already, with a hessian or with rounded inputs. damping: see `factorize`. Raises NumericsError,
    naming the weight, on NaN or infinity or without a hessian, and SchemeError where the scheme does not fit.
    """
    first, halves = next(iter(group.weights)), group.rounded_input
    both = None if halves is None else halves[0] + halves[1]
    hessian = _checked_hessian(group, group.hessian if both is None else both.hessian)
    factor = factorize(hessian, damping, first)
    aims, global_scale = group.weights, group.global_scale
    if halves is not None and both is not None and factor is not None:
        aims = fit_to_rounded_input(group.weights, halves, both, factor)

    def quantize_stack(stack: Sequence[tuple[str, slice]]) -> tuple[QuantizedTensor, Tensor]:
        rows = _stacked(group.weights, stack)
        aim = rows if aims is group.weights else _stacked(aims, stack)
        return _quantize_rows(rows, aim, group, global_scale, hessian, factor)

    parts: dict[str, list[tuple[QuantizedTensor, int]]] = {name: [] for name in group.weights}
    most_threads = sum(len(weight) for weight in group.weights.values()) // _ROWS_PER_THREAD
    with on_each_core_or_here(hessian.device, max_threads=most_threads) as cores:
        stacks = list(_stacks(group.weights, group.scheme.weight, cores.count))
        for stack, (quantized, kept) in zip(stacks, cores.map(quantize_stack, stacks), strict=True):
            start = 0
            for name, rows in stack:
                part = slice(start, start := start + rows.stop - rows.start)
                parts[name].append((quantized.rows(part), int(kept[part].sum())))
    used = None if factor is None else factor.damping
    return {
        name: GptqResult(
            QuantizedTensor.concatenate([weight for weight, _ in runs]), used, sum(kept for _, kept in runs)
        )
        for name, runs in parts.items()
    }


def _checked_hessian(group: Group, hessian: Tensor | None) -> Tensor:
    """The hessian. Raises NumericsError if it is None or does not fit a weight, or if a weight is not finite."""
    if hessian is None:
        first = next(iter(group.weights))
        raise NumericsError(f"GPTQ needs the second moments of the input of {first}; the group has none")
    for name, weight in group.weights.items():
        require_finite(weight, name)
        if hessian.shape != (weight.shape[1],) * 2:
            raise NumericsError(
                f"hessian must be (in, in) of {name} {tuple(weight.shape)}; got {tuple(hessian.shape)}"
            )
    return hessian


def _stacks(
    weights: Mapping[str, Tensor], fmt: TensorFormat, cores: int
) -> Iterator[list[tuple[str, slice]]]:
    """The rows of all weights in stacks to work on at once, so that one vector holds a column of several weights.

    Together the cores work on `_AT_ONCE` elements, each on an equal share.
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
    """The rows of a stack as one matrix."""
    pieces = [weights[name][rows] for name, rows in stack]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@torch.no_grad()  # set per thread: gradient mode is local to a thread
def _quantize_rows(
    weight: Tensor,
    aim: Tensor,
    group: Group,
    global_scale: Tensor | None,
    hessian: Tensor,
    factor: Factor | None,
) -> tuple[QuantizedTensor, Tensor]:
    """Codes of a weight (out, in), and which rows (out,) started from round to nearest.

    aim: (out, in), what the codes should come close to; the weight, or the weight fitted to rounded inputs.
    global_scale: of all weights of the group.
    """
    fmt, targets = group.scheme.weight, aim.T.contiguous()
    stored = group.scale_dtype, global_scale
    nearest = ColumnGrid.of(choose_qparams(weight, fmt, *stored), fmt, weight.shape, *stored)
    steps = nearest.round_all_(_copied_columns(weight))
    if factor is None:
        return nearest.quantized(steps), torch.ones_like(weight[:, 0], dtype=torch.bool)
    rtn_losses = row_losses(nearest.values(steps).sub_(targets), hessian)
    qparams = least_error_qparams(aim, fmt, hessian.diagonal(), *stored, ratios=_RATIOS)
    grid = ColumnGrid.of(qparams, fmt, weight.shape, *stored)
    gradient, losses = _propagate_with_gradient(targets, factor, grid, out=steps)
    kept = losses > rtn_losses
    if fmt.granularity in ("tensor", "block"):  # rows share scales, so they are kept together
        kept = (losses.sum() > rtn_losses.sum()).expand_as(kept)
    descent = Descent(targets, steps, gradient, grid, hessian)
    if bool(kept.any()):
        descent.restart(kept, nearest, nearest.round_all_(_copied_columns(weight)))
    descent.run(_SWEEPS)
    return grid.quantized(descent.steps), kept


def _copied_columns(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in) as (in, out), to be changed in place."""
    return weight.T.clone(memory_format=torch.contiguous_format)


def _propagate_with_gradient(
    targets: Tensor, factor: Factor, grid: ColumnGrid, out: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ's steps, in `out`. Returns the gradient (in, out) and the loss of each row (out,) there."""
    whitened = _propagate(targets, factor, grid, out)
    values = grid.values(out)
    whitened.sub_(values[factor.order])
    error = torch.sub(targets, values, out=values)
    gradient = factor.times(error, whitened=whitened)
    return gradient, error.mul_(gradient).sum(0)


def _propagate(targets: Tensor, factor: Factor, grid: ColumnGrid, out: Tensor) -> Tensor:
    """Round each column (out,) from its compensated target to steps of a fixed grid, in `out`.

    Returns the compensated targets (in, out), in the factor's order.
    """
    order, upper = factor.order.tolist(), factor.upper
    compensated, errors = targets[factor.order], torch.empty_like(targets)
    exact, target, error, step = targets.unbind(), compensated.unbind(), errors.unbind(), out.unbind()
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
        compensated[to].addmm_(upper[done, to].T, errors[done])

    by_halves(0, len(order), FEW, visit, carry)
    return compensated
