"""Whether a fold may be used: the block is run with it and without it, and nothing may move.

A vector of random powers of two is divided out of the producer and multiplied into what its readers read. Powers
of two are exact in floating point, so a right fold changes nothing at all, and the bound of 1e-5 is only for the
norms that multiply by 1 + gain. Three ways for a wrong fold to look right are closed (each met in a real model):

- a large residual hides the change: what is compared is each reader's own output, and what the block adds to its input;
- a tensor leaves the block by another way (a dict of shared keys and values, an attribute): those are compared too;
- a clamp that does not bite on these tokens: the producer is also tried 2^4 and 2^8 times larger.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..streaming.lanes import Call
from .experiment import Trace, observe
from .find_folds import Finder, row_factor, scaled
from .folds import Fold
from .trace import Weight

TOLERANCE = 1e-5
_MAGNITUDES = (1.0, 16.0, 256.0)
# The last place in a list that a name has.
_PLACE = re.compile(r"[.]\d+[.](?!.*[.]\d+[.])")


def find_and_prove_folds(
    block: nn.Module,
    probe: Call,
    proof: Call,
    previous_folds: Sequence[Fold] = (),
    shared: Collection[str] = (),
) -> tuple[Trace, list[Fold]]:
    """A run of the block on real sequences, and the folds that are proved on them.

    probe: a call with one-token sequences, to experiment on. proof: one with real sequences. likely: the folds of
    the block before, which are proved first: in most models all blocks are built alike, and little is left to look for.
    shared: parameters that another block holds too, which no fold may touch.
    The block computes in float32 meanwhile, whatever its parameters are held in.
    """
    with _in_float32(block):
        trace = observe(block, proof.forward, proof.args, proof.kwargs)
        fitting = [f for f in previous_folds if _stands_in(f, block, trace) and f.touched.isdisjoint(shared)]
        folds = proved(block, proof, fitting, trace)
        # Real sequences show most of it. What they leave open, such as which rows of a fused projection are the
        # value's, one-token sequences may tell.
        for call in (proof, probe):
            if _lacking(trace, folds):
                folds = _completed(block, Finder(block, call), proof, trace, folds, shared)
        return trace, [fold for fold in folds if _is_whole(fold, block)]


def _completed(
    block: nn.Module,
    finder: Finder,
    proof: Call,
    trace: Trace,
    folds: Sequence[Fold],
    shared: Collection[str],
) -> list[Fold]:
    """The folds, and those that are found and proved for the weights that lack one."""
    found = list(folds)
    while guesses := list(finder.folds(_lacking(trace, found))):
        own = [fold for fold in guesses if fold.touched.isdisjoint(shared)]
        new = proved(block, proof, own, trace, found)
        if new and prove(block, proof, [*found, *new], trace):
            found += new
    return found


def _is_whole(fold: Fold, block: nn.Module) -> bool:
    """Whether no expert is left out that is built like a reader: one that no token reached would read what changed.

    Experts are slices of a stack, or elements of one list. What an expert's own weights make, others do not read.
    """
    named = {reader.weight.name: reader.weight for reader in fold.readers}
    is_own = fold.producer.weight is not None and fold.producer.weight.index is not None
    for name, weight in named.items():
        slices = [reader.weight for reader in fold.readers if reader.weight.name == name]
        if weight.index is not None and not is_own and len(slices) < weight.count(block):
            return False
    pattern_of = {_without_number(name, fold.producer.name): name for name in named}
    others = (name for name, p in block.named_parameters() if p.dim() == 2 and name not in named)
    return not any(_without_number(name, fold.producer.name) in pattern_of for name in others)


def _without_number(name: str, producer: str) -> str:
    """A parameter's name with the place in a list left open, unless the producer stands at that place too."""
    found = _PLACE.search(name)
    if found is None or f"{producer}.".startswith(name[: found.end()]):
        return name
    return name[: found.start()] + "[]" + name[found.end() :]


def _lacking(trace: Trace, folds: Sequence[Fold]) -> set[Weight]:
    """The weights of a run that read from no fold."""
    return {p.weight for p in trace.products} - {r.weight for fold in folds for r in fold.readers}


def run_in_float32(block: nn.Module, call: Call) -> Trace:
    """A run of the block on this call, in float32, whatever its parameters are held in."""
    with _in_float32(block):
        return observe(block, call.forward, call.args, call.kwargs)


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """While open, every parameter and buffer of a floating dtype is a float32 copy; afterwards it is what it was."""
    tensors = [t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point()]
    narrow = [(t, t.data) for t in tensors if t.dtype != torch.float32]
    for tensor, data in narrow:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def _stands_in(fold: Fold, block: nn.Module, trace: Trace) -> bool:
    """Whether the weights of a fold are all there, and of the right size."""
    widths = {product.weight: product.x.shape[-1] for product in trace.products}
    heights = {
        replace(p.weight, index=i): p.y.shape[-1] for p in trace.products for i in (p.weight.index, None)
    }
    gains = {name: p.numel() for name, p in block.named_parameters() if p.dim() == 1}
    producer = fold.producer
    made = (
        [gains.get(name) for name in producer.gain]
        if producer.weight is None
        else [heights.get(producer.weight)]
    )
    return all(size == producer.size for size in made) and all(
        len(reader.channels) == widths.get(reader.weight) for reader in fold.readers
    )


def proved(
    block: nn.Module,
    call: Call,
    folds: Iterable[Fold],
    plain: Trace | None = None,
    given: Sequence[Fold] = (),
) -> list[Fold]:
    """The folds that hold on this call, in order; a weight is given to the first that takes it.

    plain: a run of the call as it is, to save one. given: folds that are proved already, and have their weights.
    """
    folds = list(folds)
    suggested = _disjoint([*given, *folds])[len(given) :]
    held = _held_among(block, call, suggested, plain)
    if held == folds:
        return held
    # Where some fail, another may take the weights that they wanted; and all must hold together.
    left = _disjoint([*given, *held, *(f for f in folds if f not in suggested)])[len(given) + len(held) :]
    held += _held_among(block, call, left, plain)
    return held if len(held) < 2 or prove(block, call, held, plain) else held[:1]


def reversible(block: nn.Module, call: Call, folds: Sequence[Fold], plain: Trace | None = None) -> list[Fold]:
    """Those of some proved folds that also hold where signs are reversed: not behind a ReLU, nor a square."""
    with _in_float32(block):
        return _held_among(block, call, [fold for fold in folds if fold.degree == 1], plain, signed=True)


def _held_among(
    block: nn.Module, call: Call, folds: Sequence[Fold], plain: Trace | None, signed: bool = False
) -> list[Fold]:
    """Those of the folds that hold, tried together as long as all do, and in halves where some do not."""
    if not folds or prove(block, call, folds, plain, signed=signed):
        return list(folds)
    if len(folds) == 1:
        return []
    middle = len(folds) // 2
    return [
        *_held_among(block, call, folds[:middle], plain, signed),
        *_held_among(block, call, folds[middle:], plain, signed),
    ]


def _disjoint(folds: Sequence[Fold]) -> list[Fold]:
    """The folds, in order, without those that read a weight which an earlier one reads."""
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
    """Whether all of `folds` together leave the block's function on `call` as it was, at every magnitude; signed: and
    with the signs of half their channels reversed."""
    generator = torch.Generator().manual_seed(seed)
    exponents = [torch.randint(-3, 4, (fold.producer.size,), generator=generator) for fold in folds]
    vectors = [torch.exp2(exponent.float()) for exponent in exponents]
    if signed:
        vectors = [s * (1 - 2 * torch.randint(2, s.shape, generator=generator)) for s in vectors]
    return all(
        _agrees(block, call, folds, vectors, magnitude, plain if magnitude == 1 else None)
        for magnitude in _MAGNITUDES
    )


def _agrees(
    block: nn.Module,
    call: Call,
    folds: Sequence[Fold],
    vectors: Sequence[Tensor],
    magnitude: float,
    before: Trace | None,
) -> bool:
    if before is None:
        before = _run(block, call, folds, [torch.ones_like(s) for s in vectors], magnitude)
    after = _run(block, call, folds, vectors, magnitude)
    return _same(before, after, call, {r.weight for f in folds for r in f.readers})


def _run(
    block: nn.Module, call: Call, folds: Sequence[Fold], vectors: Sequence[Tensor], magnitude: float
) -> Trace:
    """The block with each producer `magnitude` times larger and divided by its vector, which its readers undo."""
    inputs: dict[Weight, Tensor] = {}
    outputs: dict[Weight, Tensor] = {}
    with ExitStack() as gains:
        for fold, s in zip(folds, vectors, strict=True):
            s = s.masked_fill(~fold.reached, 1.0)
            gains.enter_context(scaled(block, fold.producer, magnitude / s))
            if fold.producer.weight is not None:
                outputs[fold.producer.weight] = row_factor(fold.producer, magnitude / s)
            inputs |= {reader.weight: reader.spread(s) for reader in fold.readers}
        return observe(block, call.forward, call.args, call.kwargs, inputs, outputs)


def _same(before: Trace, after: Trace, call: Call, readers: set[Weight]) -> bool:
    if len(before.products) != len(after.products) or len(before.escaped) != len(after.escaped):
        return False
    read = 0
    for a, b in zip(before.products, after.products, strict=True):
        if a.weight != b.weight or a.y.shape != b.y.shape:
            return False
        if a.weight in readers:
            read += 1
            if not _close(a.y, b.y):
                return False
    hidden = _hidden(call)
    pairs = zip(before.returned + before.escaped, after.returned + after.escaped, strict=True)
    return read > 0 and all(_close(*(_less(t, hidden) for t in pair)) for pair in pairs)


def _hidden(call: Call) -> Tensor | None:
    tensors = [a for a in [*call.args, *call.kwargs.values()] if isinstance(a, Tensor)]
    return next((t for t in tensors if t.is_floating_point() and t.dim() == 3), None)


def _less(x: Tensor, hidden: Tensor | None) -> Tensor:
    return x - hidden.to(x.dtype) if hidden is not None and hidden.shape == x.shape else x


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-5 relative to `a` itself; what is not finite must be so in both."""
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
