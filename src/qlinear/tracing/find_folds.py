"""Who feeds whom: each possible producer is scaled, channel by channel, and the weights' inputs are watched.

Give channel r of a norm's gain, or row r of a weight, the factor 2^e(r), where e stands for a digit of r. If some
weight's input channel j comes out scaled by exactly 2^e on every token, it carries what producer channel r makes,
through whatever views, repeats and products with other tensors lie between; a digit or two tell which r. That one
experiment covers norm -> linears, up -> down, and v -> o with its heads repeated for grouped queries.

The runs are replays, in which a change goes no further than the next product. What a tensor was computed from is known
from the recorded run, so that only producers are tried which can reach a weight that still lacks one. What is found
is a guess; `proof` decides.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..streaming.lanes import Call
from .experiment import Product, Trace, observe
from .folds import Fold, Producer, Reader
from .trace import Weight

# The digits 0 ... 23 are the factors 2^1, 2^3 ... 2^47. 2^0 is what others' channels show. As all are odd, an even
# power tells that the producer came squared; as none is small, a gain that is added to 1 keeps its precision.
_BASE = 24
_MOST_PARTS = 4


def candidates(block: nn.Module, trace: Trace, wanted: Collection[Weight]) -> Iterator[list[Producer]]:
    """The producers that may reach a weight in `wanted`, each as the forms to try in turn.

    Norms first, they reach the most; then weights, the last first: the value is projected after the query, and the
    last to be multiplied with others is more often a plain factor than the argument of an activation.
    """
    reads = [product for product in trace.products if product.weight in wanted]
    reach = {name for product in reads for name in product.made_from}
    biases = {product.bias for product in trace.products}
    for name, parameter in block.named_parameters():
        is_gain = parameter.dim() == 1 and name not in biases and not _is_bias_of_gain(block, name)
        if is_gain and name in reach:
            gain = (name, *_companions(block, name, biases))
            yield [Producer(parameter.numel(), gain, offset) for offset in (0.0, 1.0)]
    # The slices of a stack of experts are built alike, and tried all at once.
    weights = {replace(p.weight, index=None): p for p in trace.products if p.weight.name in reach}
    for weight, product in reversed(weights.items()):
        size = product.y.shape[-1]
        if weight.of(block).shape[-2] == size:  # and not a matrix that is used in blocks
            widths = {p.x.shape[-1] for p in reads if weight.name in p.made_from}
            forms = [None, *_parts(size, widths)]
            yield [Producer(size, weight=weight, bias=product.bias, rows=rows) for rows in forms]


def _parts(size: int, widths: Collection[int]) -> Iterator[tuple[int, int, int]]:
    """The rows (start, stop, step) of each part of a fused projection as wide as a reader: together, or interleaved."""
    for width in sorted(widths):
        count = size // width
        if size % width == 0 and 1 < count <= _MOST_PARTS:
            yield from ((i * width, (i + 1) * width, 1) for i in range(count))
            yield from ((i, size, count) for i in range(count))


def _is_bias_of_gain(block: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and block.get_submodule(owner)._parameters.get("weight") is not None


def _companions(block: nn.Module, name: str, biases: set[str | None]) -> tuple[str, ...]:
    """The other vectors of a gain's module: added after it, they are scaled with it."""
    owner, _, leaf = name.rpartition(".")
    own = block.get_parameter(name)
    vectors = block.get_submodule(owner).named_parameters(recurse=False)
    full = ((f"{owner}.{other}" if owner else other, p) for other, p in vectors if other != leaf)
    return tuple(other for other, p in full if p.shape == own.shape and other not in biases) if owner else ()


@contextmanager
def scaled(block: nn.Module, producer: Producer, factor: Tensor) -> Iterator[None]:
    """While open, the producer's gain is multiplied by `factor` (size,); a weight's rows are left to `observe`."""
    vectors = [block.get_parameter(name) for name in producer.gain]
    saved = [vector.detach().clone() for vector in vectors]
    with torch.no_grad():
        for i, vector in enumerate(vectors):
            offset = producer.offset if i == 0 else 0.0
            vector.copy_((vector + offset) * factor.to(vector.device) - offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for vector, before in zip(vectors, saved, strict=True):
                vector.copy_(before)


def row_factor(producer: Producer, factor: Tensor) -> Tensor:
    """`factor` (size,) on the rows that the producer means, 1 on the others."""
    if producer.rows is None:
        return factor
    ones = torch.ones_like(factor)
    part = slice(*producer.rows)
    ones[part] = factor[part]
    return ones


class Finder:
    """Finds the folds of one block by experiments on `call`.

    On sequences of one token, attention passes its value through whatever the query and key, so that even in a fused
    projection the value's rows show. Channels that a ReLU keeps silent answer when the producer's sign is turned.
    """

    def __init__(self, block: nn.Module, call: Call) -> None:
        self._block, self._call = block, _enliven(call)
        self._tried: set[tuple[str, ...]] = set()
        self.trace = observe(block, self._call.forward, self._call.args, self._call.kwargs)

    def folds(self, wanted: Collection[Weight] | None = None) -> Iterator[Fold]:
        """Folds that the experiments suggest, of which some weight in `wanted` reads, each only once.

        A weight that has been found one is not looked at again in the same go.
        """
        lacking = {p.weight for p in self.trace.products} if wanted is None else set(wanted)
        for forms in candidates(self._block, self.trace, lacking):
            names = forms[0].gain or (str(forms[0].weight),)
            if names in self._tried or not self._may_reach(forms[0], lacking):
                continue
            self._tried.add(names)
            fold = next((f for f in map(self._fold, forms) if f is not None), None)
            if fold is not None:
                lacking -= {reader.weight for reader in fold.readers}
                yield from _slice_by_slice(fold, self._block)

    def _may_reach(self, producer: Producer, weights: Collection[Weight]) -> bool:
        name = producer.gain[0] if producer.weight is None else producer.weight.name
        return any(name in p.made_from for p in self.trace.products if p.weight in weights)

    def _fold(self, producer: Producer) -> Fold | None:
        channels = self._channels(producer, self.trace, 1.0)
        if any(bool((known < 0).any()) for _, known in channels.values()):
            flip_signs = self._run(producer, -torch.ones(producer.size))
            more = self._channels(producer, flip_signs, -1.0)
            channels = {
                w: (degree, torch.maximum(c, more.get(w, (degree, c))[1]))
                for w, (degree, c) in channels.items()
            }
        readers = tuple(Reader(w, c, degree) for w, (degree, c) in channels.items() if bool((c >= 0).any()))
        return Fold(producer, readers) if len({reader.degree for reader in readers}) == 1 else None

    def _run(self, producer: Producer, factor: Tensor) -> Trace:
        call, rows = self._call, row_factor(producer, factor)
        outputs = {p.weight: rows for p in self.trace.products if _is_own(producer, p.weight)}
        with scaled(self._block, producer, factor):
            return observe(self._block, call.forward, call.args, call.kwargs, None, outputs, self.trace)

    def _channels(self, producer: Producer, before: Trace, sign: float) -> dict[Weight, tuple[int, Tensor]]:
        """For each weight that reads the producer: to which power, and which of its channels each input carries."""
        index = torch.arange(producer.size)
        channels: dict[Weight, tuple[int, Tensor]] = {}
        place = 1
        while place < producer.size or place == 1:
            factor = sign * torch.exp2(2.0 * ((index // place) % _BASE) + 1)
            digits = _answers(producer, before, self._run(producer, factor))
            if place == 1:
                channels = {weight: (degree, torch.zeros_like(d)) for weight, (degree, d) in digits.items()}
            channels = {
                w: (degree, _append(c, digits[w][1], place))
                for w, (degree, c) in channels.items()
                if w in digits and digits[w][0] == degree
            }
            if not channels:
                break
            place *= _BASE
        return {w: (degree, torch.where(c < producer.size, c, -1)) for w, (degree, c) in channels.items()}


def _slice_by_slice(fold: Fold, block: nn.Module) -> Iterator[Fold]:
    """A fold of a whole stack as one of each slice into its own readers."""
    producer = fold.producer
    if producer.weight is None or producer.weight.of(block).dim() < 3:
        yield fold
        return
    for index in {reader.weight.index for reader in fold.readers} - {None}:
        own = replace(producer, weight=replace(producer.weight, index=index))
        yield Fold(own, tuple(reader for reader in fold.readers if reader.weight.index == index))


def _answers(producer: Producer, before: Trace, after: Trace) -> dict[Weight, tuple[int, Tensor]]:
    """For each weight whose input answers cleanly: to which power, and each input channel's digit, -1 if silent."""
    answers: dict[Weight, tuple[int, Tensor] | None] = {}
    for a, b in _paired(before, after):
        shown = None if _is_own(producer, a.weight) else _digits(a.x, b.x)
        # A weight that is used twice has to answer alike both times.
        alike = a.weight not in answers or _alike(answers[a.weight], shown)
        answers[a.weight] = shown if alike else None
    return {weight: shown for weight, shown in answers.items() if shown is not None}


def _is_own(producer: Producer, weight: Weight) -> bool:
    return producer.weight in (weight, replace(weight, index=None))


def _alike(a: tuple[int, Tensor] | None, b: tuple[int, Tensor] | None) -> bool:
    return a is not None and b is not None and a[0] == b[0] and torch.equal(a[1], b[1])


def _append(channels: Tensor, digit: Tensor, place: int) -> Tensor:
    return torch.where((channels < 0) | (digit < 0), -torch.ones_like(channels), channels + digit * place)


def _paired(before: Trace, after: Trace) -> Iterator[tuple[Product, Product]]:
    """Products of the same weight in two runs; none if the runs took different ways."""
    if [p.weight for p in before.products] != [p.weight for p in after.products]:
        return
    for a, b in zip(before.products, after.products, strict=True):
        if a.x.shape == b.x.shape:
            yield a, b


def _digits(before: Tensor, after: Tensor) -> tuple[int, Tensor] | None:
    """The power to which the producer came, 1 or 2, and per channel the digit by which it was scaled on all tokens;
    -1 where it is always zero or never scaled.

    None if some channel was not scaled by one power of two, or if nothing was scaled at all.
    """
    live = before != 0
    if torch.equal(before, after) or bool(((after != 0) != live).any()):
        return None
    exponent = torch.log2((after / before).abs().masked_fill(~live, 1.0))
    whole = exponent.round()
    highest = whole.masked_fill(~live, -torch.inf).amax(0)
    lowest = whole.masked_fill(~live, torch.inf).amin(0)
    alive = live.any(0)
    if not bool((highest == lowest)[alive].all()) or not bool(((exponent - whole).abs() < 1e-3).all()):
        return None
    moved = alive & (highest != 0)
    degree = 1 if bool((highest[moved] % 2 == 1).all()) else 2
    digit = (highest / degree - 1) / 2
    if not bool(((digit == digit.round()) & (digit >= 0) & (digit < _BASE))[moved].all()):
        return None
    return degree, torch.where(moved, digit, -1.0).long().cpu()


def _enliven(call: Call) -> Call:
    """The call with noise added to its hidden state, so that channels which the sample leaves at zero show too."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
        return (x.float() + noise * x.float().std()).to(x.dtype)

    is_hidden = [isinstance(a, Tensor) and a.is_floating_point() and a.dim() == 3 for a in call.args]
    if any(is_hidden):
        first = is_hidden.index(True)
        args = tuple(noisy(a) if i == first else a for i, a in enumerate(call.args))
        return Call(call.module, call.forward, args, call.kwargs)
    hidden = call.kwargs.get("hidden_states")
    kwargs = call.kwargs | ({"hidden_states": noisy(hidden)} if isinstance(hidden, Tensor) else {})
    return Call(call.module, call.forward, call.args, kwargs)
