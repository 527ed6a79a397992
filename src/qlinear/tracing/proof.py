"""Proves folds: a fold is used only if the block computes the same with and without it.

The producer is divided by a vector of random powers of two, and its readers' inputs are multiplied by it. Powers of two
are exact in floating point, so a right fold changes nothing; the bound of 1e-5 is only for norms that multiply by
1 + gain. Three ways for a wrong fold to look right are closed (each was met in a real model):

- A large residual hides the change. So each reader's own output is compared, and the block's output minus its input.
- A tensor leaves the block as a side output (a dict of shared keys and values, an attribute). These are compared too.
- A clamp has no effect on these tokens. So the producer is also tried 2^4 and 2^8 times larger.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..streaming.float32 import in_float32, tensors_of
from ..streaming.lanes import Call
from .experiment import Trace, observe
from .find_folds import FoldFinder, row_factor, scaled
from .folds import Fold
from .trace import Weight

TOLERANCE = 1e-5
_MAGNITUDES = (1.0, 16.0, 256.0)
# The last list index in a parameter's name.
_INDEX = re.compile(r"[.]\d+[.](?!.*[.]\d+[.])")


def find_and_prove_folds(
    block: nn.Module,
    probe: Call,
    proof: Call,
    previous_folds: Sequence[Fold] = (),
    shared: Collection[str] = (),
) -> tuple[Trace, list[Fold]]:
    """Run the block on real sequences, and find the folds that are proved on them.

    probe: a call with one-token sequences, for experiments. proof: a call with real sequences. previous_folds: the
    preceding block's folds, which are tried first, because most models repeat one block structure. shared: names of
    parameters that another block also uses; no fold may change them. The block computes in float32 whatever the dtype
    of its parameters. Returns the trace of `proof`, and the folds.
    """
    with in_float32(tensors_of(block)):
        trace = observe(block, proof.forward, proof.args, proof.kwargs)
        fitting = [f for f in previous_folds if _fits(f, block, trace) and f.touched.isdisjoint(shared)]
        folds = proved(block, proof, fitting, trace)
        # Real sequences show most folds. One-token sequences also show the value's rows in a fused projection.
        for call in (proof, probe):
            if _without_fold(trace, folds):
                folds = _with_missing_folds(block, FoldFinder(block, call), proof, trace, folds, shared)
        return trace, [fold for fold in folds if _is_whole(fold, block)]


def _with_missing_folds(
    block: nn.Module,
    finder: FoldFinder,
    proof: Call,
    trace: Trace,
    folds: Sequence[Fold],
    shared: Collection[str],
) -> list[Fold]:
    """`folds`, extended by proved folds for the weights that have none."""
    known = list(folds)
    while guesses := list(finder.folds(_without_fold(trace, known))):
        allowed = [fold for fold in guesses if fold.touched.isdisjoint(shared)]
        new = proved(block, proof, allowed, trace, known)
        if new and prove(block, proof, [*known, *new], trace):
            known += new
    return known


def _is_whole(fold: Fold, block: nn.Module) -> bool:
    """Whether the fold covers every expert: an expert that no token reached would also read the changed producer.

    Experts are slices of a stack, or elements of one list. The output of an expert's own weight is read by that expert
    alone, so such a producer needs no other readers.
    """
    named = {reader.weight.name: reader.weight for reader in fold.readers}
    is_own = fold.producer.weight is not None and fold.producer.weight.index is not None
    for name, weight in named.items():
        slices = [reader.weight for reader in fold.readers if reader.weight.name == name]
        if weight.index is not None and not is_own and len(slices) < weight.count(block):
            return False
    pattern_of = {_without_index(name, fold.producer.name): name for name in named}
    others = (name for name, p in block.named_parameters() if p.dim() == 2 and name not in named)
    return not any(_without_index(name, fold.producer.name) in pattern_of for name in others)


def _without_index(name: str, producer: str) -> str:
    """A parameter's name with its last list index replaced by `[]`, except under the producer's own index."""
    match = _INDEX.search(name)
    if match is None or f"{producer}.".startswith(name[: match.end()]):
        return name
    return name[: match.start()] + "[]" + name[match.end() :]


def _without_fold(trace: Trace, folds: Sequence[Fold]) -> set[Weight]:
    """The weights of a run that read from none of the folds."""
    return {p.weight for p in trace.products} - {r.weight for fold in folds for r in fold.readers}


def run_in_float32(block: nn.Module, call: Call) -> Trace:
    """Run the block on this call in float32, whatever the dtype of its parameters."""
    with in_float32(tensors_of(block)):
        return observe(block, call.forward, call.args, call.kwargs)


def _fits(fold: Fold, block: nn.Module, trace: Trace) -> bool:
    """Whether the block has all weights of a fold, in the fold's sizes."""
    widths = {product.weight: product.x.shape[-1] for product in trace.products}
    heights = {
        replace(p.weight, index=i): p.y.shape[-1] for p in trace.products for i in (p.weight.index, None)
    }
    gains = {name: p.numel() for name, p in block.named_parameters() if p.dim() == 1}
    producer = fold.producer
    sizes = (
        [gains.get(name) for name in producer.gain]
        if producer.weight is None
        else [heights.get(producer.weight)]
    )
    return all(size == producer.size for size in sizes) and all(
        len(reader.channels) == widths.get(reader.weight) for reader in fold.readers
    )


def proved(
    block: nn.Module,
    call: Call,
    folds: Iterable[Fold],
    plain: Trace | None = None,
    given: Sequence[Fold] = (),
) -> list[Fold]:
    """The folds that hold on this call, in order; a weight goes to the first fold that reads it.

    plain: a recorded run of the call without folds, if the caller has one. given: folds that are already proved, whose
    readers are taken.
    """
    folds = list(folds)
    suggested = _disjoint([*given, *folds])[len(given) :]
    passing = _passing(block, call, suggested, plain)
    if passing == folds:
        return passing
    # Where a fold fails, another one may take its weights. In the end all must hold together.
    others = [*given, *passing, *(f for f in folds if f not in suggested)]
    remaining = _disjoint(others)[len(given) + len(passing) :]
    passing += _passing(block, call, remaining, plain)
    return passing if len(passing) < 2 or prove(block, call, passing, plain) else passing[:1]


def reversible(block: nn.Module, call: Call, folds: Sequence[Fold], plain: Trace | None = None) -> list[Fold]:
    """The proved folds that also hold with reversed signs: excludes folds through a ReLU or a square."""
    with in_float32(tensors_of(block)):
        return _passing(block, call, [fold for fold in folds if fold.degree == 1], plain, signed=True)


def _passing(
    block: nn.Module, call: Call, folds: Sequence[Fold], plain: Trace | None, signed: bool = False
) -> list[Fold]:
    """The folds that hold. All are tried together first; if that fails, each half on its own."""
    if not folds or prove(block, call, folds, plain, signed=signed):
        return list(folds)
    if len(folds) == 1:
        return []
    middle = len(folds) // 2
    return [
        *_passing(block, call, folds[:middle], plain, signed),
        *_passing(block, call, folds[middle:], plain, signed),
    ]


def _disjoint(folds: Sequence[Fold]) -> list[Fold]:
    """The folds in order, skipping any that shares a reader with an earlier one."""
    taken: set[Weight] = set()
    kept = []
    for fold in folds:
        readers = {reader.weight for reader in fold.readers}
        if not readers & taken:
            taken |= readers
            kept.append(fold)
    return kept


def prove(
    block: nn.Module,
    call: Call,
    folds: Sequence[Fold],
    plain: Trace | None = None,
    seed: int = 0,
    signed: bool = False,
) -> bool:
    """Whether all `folds` together leave the block's function on `call` unchanged, at every magnitude.

    signed: also reverse the signs of about half of the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    exponents = [torch.randint(-3, 4, (fold.producer.size,), generator=generator) for fold in folds]
    vectors = [torch.exp2(exponent.float()) for exponent in exponents]
    if signed:
        vectors = [s * (1 - 2 * torch.randint(2, s.shape, generator=generator)) for s in vectors]
    return all(
        _is_unchanged(block, call, folds, vectors, magnitude, plain if magnitude == 1 else None)
        for magnitude in _MAGNITUDES
    )


def _is_unchanged(
    block: nn.Module,
    call: Call,
    folds: Sequence[Fold],
    vectors: Sequence[Tensor],
    magnitude: float,
    before: Trace | None,
) -> bool:
    if before is None:
        before = _run(block, call, folds, [torch.ones_like(s) for s in vectors], magnitude)
    after = _run(block, call, folds, vectors, magnitude, before)
    return _runs_agree(before, after, call, {r.weight for f in folds for r in f.readers})


def _run(
    block: nn.Module,
    call: Call,
    folds: Sequence[Fold],
    vectors: Sequence[Tensor],
    magnitude: float,
    before: Trace | None = None,
) -> Trace:
    """Run the block with each producer times `magnitude` / s, and its readers' inputs times s.

    before: a run without s. A right fold leaves every product's input bit for bit as it was there, so that nothing is
    multiplied again.
    """
    inputs: dict[Weight, Tensor] = {}
    outputs: dict[Weight, Tensor] = {}
    with ExitStack() as gains:
        for fold, s in zip(folds, vectors, strict=True):
            s = s.masked_fill(~fold.reached, 1.0)
            gains.enter_context(scaled(block, fold.producer, magnitude / s))
            if fold.producer.weight is not None:
                outputs[fold.producer.weight] = row_factor(fold.producer, magnitude / s)
            inputs |= {reader.weight: reader.spread(s) for reader in fold.readers}
        return observe(block, call.forward, call.args, call.kwargs, inputs, outputs, reuse=before)


def _runs_agree(before: Trace, after: Trace, call: Call, readers: set[Weight]) -> bool:
    if len(before.products) != len(after.products) or len(before.side_outputs) != len(after.side_outputs):
        return False
    read = 0
    for a, b in zip(before.products, after.products, strict=True):
        if a.weight != b.weight or a.y.shape != b.y.shape:
            return False
        if a.weight in readers:
            read += 1
            if not _is_close(a.y, b.y):
                return False
    hidden = _hidden(call)
    pairs = zip(before.returned + before.side_outputs, after.returned + after.side_outputs, strict=True)
    return read > 0 and all(_is_close(*(_minus_hidden(t, hidden) for t in pair)) for pair in pairs)


def _hidden(call: Call) -> Tensor | None:
    tensors = [a for a in [*call.args, *call.kwargs.values()] if isinstance(a, Tensor)]
    return next((t for t in tensors if t.is_floating_point() and t.dim() == 3), None)


def _minus_hidden(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x - hidden.to(x.dtype) if hidden is not None and hidden.shape == x.shape else x


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether |a - b| <= 1e-5 |a| in the Euclidean norm; the same elements must be finite in both."""
    if a.shape != b.shape:
        return False
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return False
    a, b = a[finite], b[finite]
    return bool((a - b).norm() <= TOLERANCE * a.norm())
