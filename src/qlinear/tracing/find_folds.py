"""Finds producers and their readers: scale each channel of a possible producer, and see which inputs change.

Channel r of a norm's gain, or row r of a weight, gets the factor 2^e(r), where e(r) encodes a digit of r in base 24.
If a weight's input channel j comes out scaled by exactly 2^e on every token, it carries producer channel r, whatever
views, repeats and products with other tensors lie between. One or two digits identify r. This one experiment covers
norm -> linears, up -> down, and v -> o with its heads repeated for grouped queries.

The runs are replays, so a change goes no further than the next product. The recorded run tells what a tensor was
computed from, so only producers are tried that can reach a weight without a fold. The result is a guess, which `proof`
accepts or rejects.
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

# The digits 0 ... 23 are the factors 2^1, 2^3 ... 2^47; an unscaled channel shows 2^0. All exponents are odd, so an
# even one shows that the producer was squared. No factor is below 1, so a gain that is added to 1 keeps its precision.
_BASE = 24
_MOST_PARTS = 4


def candidate_producers(
    block: nn.Module, trace: Trace, wanted: Collection[Weight]
) -> Iterator[list[Producer]]:
    """The producers that may reach a weight in `wanted`, each as a list of forms to try in turn.

    Norms come first, since they reach the most weights. Then weights, last to first: the value is projected after the
    query, and the last factor of an elementwise product (up) is more often linear than the first (gate).
    """
    reads = [product for product in trace.products if product.weight in wanted]
    reach = {name for product in reads for name in product.computed_from}
    biases = {product.bias for product in trace.products}
    for name, parameter in block.named_parameters():
        is_gain = parameter.dim() == 1 and name not in biases and not _is_bias_of_gain(block, name)
        if is_gain and name in reach:
            gain = (name, *_companions(block, name, biases))
            yield [Producer(parameter.numel(), gain, offset) for offset in (0.0, 1.0)]
    # All slices of a stack of experts are tried at once, because they have the same structure.
    weights = {replace(p.weight, index=None): p for p in trace.products if p.weight.name in reach}
    for weight, product in reversed(weights.items()):
        size = product.y.shape[-1]
        if weight.of(block).shape[-2] == size:  # excludes a matrix that is used in blocks
            widths = {p.x.shape[-1] for p in reads if weight.name in p.computed_from}
            forms = [None, *_parts(size, widths)]
            yield [Producer(size, weight=weight, bias=product.bias, rows=rows) for rows in forms]


def _parts(size: int, widths: Collection[int]) -> Iterator[tuple[int, int, int]]:
    """The rows (start, stop, step) of each part of a fused projection that has a reader's width.

    A part's rows are adjacent, or interleaved with the other parts'.
    """
    for width in sorted(widths):
        count = size // width
        if size % width == 0 and 1 < count <= _MOST_PARTS:
            yield from ((i * width, (i + 1) * width, 1) for i in range(count))
            yield from ((i, size, count) for i in range(count))


def _is_bias_of_gain(block: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and block.get_submodule(owner)._parameters.get("weight") is not None


def _companions(block: nn.Module, name: str, biases: set[str | None]) -> tuple[str, ...]:
    """The other vectors of a gain's module, such as its bias: they are added after the gain and scaled with it."""
    owner, _, leaf = name.rpartition(".")
    gain = block.get_parameter(name)
    vectors = block.get_submodule(owner).named_parameters(recurse=False)
    full = ((f"{owner}.{other}" if owner else other, p) for other, p in vectors if other != leaf)
    return tuple(other for other, p in full if p.shape == gain.shape and other not in biases) if owner else ()


@contextmanager
def scaled(block: nn.Module, producer: Producer, factor: Tensor) -> Iterator[None]:
    """Context manager: the producer's gain is multiplied by `factor` (size,). `observe` scales a weight's output."""
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
    """`factor` (size,) on the rows of `producer.rows`, 1 on the others."""
    if producer.rows is None:
        return factor
    ones = torch.ones_like(factor)
    part = slice(*producer.rows)
    ones[part] = factor[part]
    return ones


class FoldFinder:
    """Finds the folds of one block by experiments on `call`.

    With sequences of one token, attention returns its value whatever the query and key, so the value's rows show even
    in a fused projection. Channels that a ReLU sets to zero show when the producer's sign is flipped.
    """

    def __init__(self, block: nn.Module, call: Call) -> None:
        self._block, self._call = block, _with_noise(call)
        self._tried: set[tuple[str, ...]] = set()
        self.trace = observe(block, self._call.forward, self._call.args, self._call.kwargs)

    def folds(self, wanted: Collection[Weight] | None = None) -> Iterator[Fold]:
        """Suggest folds that a weight in `wanted` reads from; each producer is suggested once over all calls.

        Within one call, the readers of a suggested fold need no further one.
        """
        remaining = {p.weight for p in self.trace.products} if wanted is None else set(wanted)
        for forms in candidate_producers(self._block, self.trace, remaining):
            names = forms[0].gain or (str(forms[0].weight),)
            if names in self._tried or not self._may_reach(forms[0], remaining):
                continue
            self._tried.add(names)
            fold = next((f for f in map(self._fold, forms) if f is not None), None)
            if fold is not None:
                remaining -= {reader.weight for reader in fold.readers}
                yield from _slice_by_slice(fold, self._block)

    def _may_reach(self, producer: Producer, weights: Collection[Weight]) -> bool:
        name = producer.gain[0] if producer.weight is None else producer.weight.name
        return any(name in p.computed_from for p in self.trace.products if p.weight in weights)

    def _fold(self, producer: Producer) -> Fold | None:
        channels = self._channels(producer, self.trace, 1.0)
        if any(bool((known < 0).any()) for _, known in channels.values()):
            flipped = self._run(producer, -torch.ones(producer.size))
            more = self._channels(producer, flipped, -1.0)
            channels = {
                w: (degree, torch.maximum(c, more.get(w, (degree, c))[1]))
                for w, (degree, c) in channels.items()
            }
        readers = tuple(Reader(w, c, degree) for w, (degree, c) in channels.items() if bool((c >= 0).any()))
        return Fold(producer, readers) if len({reader.degree for reader in readers}) == 1 else None

    def _run(self, producer: Producer, factor: Tensor) -> Trace:
        call, rows = self._call, row_factor(producer, factor)
        outputs = {p.weight: rows for p in self.trace.products if _is_weight_of(producer, p.weight)}
        with scaled(self._block, producer, factor):
            return observe(self._block, call.forward, call.args, call.kwargs, None, outputs, self.trace)

    def _channels(self, producer: Producer, before: Trace, sign: float) -> dict[Weight, tuple[int, Tensor]]:
        """For each reader of the producer: the degree, and the producer channel of each input channel (in,)."""
        index = torch.arange(producer.size)
        channels: dict[Weight, tuple[int, Tensor]] = {}
        place = 1
        while place < producer.size or place == 1:
            factor = sign * torch.exp2(2.0 * ((index // place) % _BASE) + 1)
            digits = _responses(producer, before, self._run(producer, factor))
            if place == 1:
                channels = {weight: (degree, torch.zeros_like(d)) for weight, (degree, d) in digits.items()}
            channels = {
                w: (degree, _with_digit(c, digits[w][1], place))
                for w, (degree, c) in channels.items()
                if w in digits and digits[w][0] == degree
            }
            if not channels:
                break
            place *= _BASE
        return {w: (degree, torch.where(c < producer.size, c, -1)) for w, (degree, c) in channels.items()}


def _slice_by_slice(fold: Fold, block: nn.Module) -> Iterator[Fold]:
    """Split the fold of a whole stack into one fold per slice, each with that slice's readers."""
    producer = fold.producer
    if producer.weight is None or producer.weight.of(block).dim() < 3:
        yield fold
        return
    for index in {reader.weight.index for reader in fold.readers} - {None}:
        one_slice = replace(producer, weight=replace(producer.weight, index=index))
        yield Fold(one_slice, tuple(reader for reader in fold.readers if reader.weight.index == index))


def _responses(producer: Producer, before: Trace, after: Trace) -> dict[Weight, tuple[int, Tensor]]:
    """For each weight whose input was scaled by clean powers: the degree, and each input channel's digit or -1."""
    responses: dict[Weight, tuple[int, Tensor] | None] = {}
    for a, b in _product_pairs(before, after):
        response = None if _is_weight_of(producer, a.weight) else _scaling_digits(a.x, b.x)
        # A weight that is used twice must respond in the same way both times.
        is_consistent = a.weight not in responses or _is_equal(responses[a.weight], response)
        responses[a.weight] = response if is_consistent else None
    return {weight: response for weight, response in responses.items() if response is not None}


def _is_weight_of(producer: Producer, weight: Weight) -> bool:
    return producer.weight in (weight, replace(weight, index=None))


def _is_equal(a: tuple[int, Tensor] | None, b: tuple[int, Tensor] | None) -> bool:
    return a is not None and b is not None and a[0] == b[0] and torch.equal(a[1], b[1])


def _with_digit(channels: Tensor, digit: Tensor, place: int) -> Tensor:
    return torch.where((channels < 0) | (digit < 0), -torch.ones_like(channels), channels + digit * place)


def _product_pairs(before: Trace, after: Trace) -> Iterator[tuple[Product, Product]]:
    """Pairs of products of the same weight in two runs; none if the runs multiplied different weights."""
    if [p.weight for p in before.products] != [p.weight for p in after.products]:
        return
    for a, b in zip(before.products, after.products, strict=True):
        if a.x.shape == b.x.shape:
            yield a, b


def _scaling_digits(before: Tensor, after: Tensor) -> tuple[int, Tensor] | None:
    """The degree, 1 or 2, and each channel's digit (in,): -1 where the channel is always zero or was not scaled.

    None if a channel was not scaled by one power of two on all tokens, or if no channel was scaled.
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


def _with_noise(call: Call) -> Call:
    """The call with noise added to its hidden state, so that channels that are zero in the sample show too."""
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
