"""Who feeds whom: each possible producer is scaled, channel by channel, and the weights' inputs are watched.

Give channel r of a norm's gain, or row r of a weight, the factor 2^d(r), where d is a digit of r. If some weight's
input channel j comes out scaled by exactly 2^e on every token, it carries what producer channel r with d(r) = e
makes, through whatever views, repeats and products with other tensors lie between; a few digits tell which r. That one
experiment covers norm -> linears, up -> down, and v -> o with its heads repeated for grouped queries.

It runs on sequences of one token. There attention passes its value through unchanged whatever the query and key,
so even in a fused projection the value's rows show. What is found is a guess; `proof` decides on real sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..blocks import Call
from .folds import Fold, Producer, Reader
from .observe import Product, Trace, Weight, observe

# The digits 0 ... 7 are the factors 2^-4 ... 2^-1 and 2^1 ... 2^4; 2^0 is what others' channels show.
_BASE = 8


def candidates(block: nn.Module, trace: Trace) -> Iterator[list[Producer]]:
    """The producers a block may have, each as the forms to try in turn: norms first, they reach the most."""
    biases = {product.bias for product in trace.products}
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1 and name not in biases and not _is_bias_of_gain(block, name):
            gain = (name, *_companions(block, name, biases))
            yield [Producer(parameter.numel(), gain, offset) for offset in (0.0, 1.0)]
    widths = {product.x.shape[-1] for product in trace.products}
    # The slices of a stack of experts are built alike, and tried all at once.
    for weight, product in {replace(p.weight, index=None): p for p in trace.products}.items():
        size = product.y.shape[-1]
        halves = [(0, size // 2, 1), (size // 2, size, 1), (0, size, 2), (1, size, 2)]
        forms = [None, *(halves if size % 2 == 0 and size // 2 in widths else [])]
        yield [Producer(size, weight=weight, bias=product.bias, rows=rows) for rows in forms]


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
    """Finds the folds of one block by experiments on `call`, a batch of one-token sequences.

    Channels that a ReLU keeps silent answer when the producer's sign is turned.
    """

    def __init__(self, block: nn.Module, call: Call) -> None:
        self._block, self._call = block, _enliven(call)
        self.trace = observe(block, self._call.forward, self._call.args, self._call.kwargs, frozen=True)

    def folds(self) -> Iterator[Fold]:
        """Every fold that the experiments suggest, norms first; a weight may stand in several."""
        for forms in candidates(self._block, self.trace):
            for producer in forms:
                readers = self._readers(producer)
                if readers:
                    yield from _slice_by_slice(Fold(producer, readers))
                    break

    def _readers(self, producer: Producer) -> tuple[Reader, ...]:
        channels = self._channels(producer, self.trace, 1.0)
        if any(bool((known < 0).any()) for known in channels.values()):
            turned = self._run(producer, -torch.ones(producer.size))
            more = self._channels(producer, turned, -1.0)
            channels = {w: torch.maximum(c, more.get(w, c)) for w, c in channels.items()}
        return tuple(Reader(w, c) for w, c in channels.items() if bool((c >= 0).any()))

    def _run(self, producer: Producer, factor: Tensor) -> Trace:
        call, rows = self._call, row_factor(producer, factor)
        outputs = {p.weight: rows for p in self.trace.products if _is_own(producer, p.weight)}
        with scaled(self._block, producer, factor):
            return observe(self._block, call.forward, call.args, call.kwargs, None, outputs, frozen=True)

    def _channels(self, producer: Producer, before: Trace, sign: float) -> dict[Weight, Tensor]:
        """For each weight that reads the producer: which of its channels each input channel carries."""
        index = torch.arange(producer.size)
        channels: dict[Weight, Tensor] = {}
        place = 1
        while place < producer.size or place == 1:
            factor = sign * torch.exp2(_exponent((index // place) % _BASE))
            digits = _answers(producer, before, self._run(producer, factor))
            if place == 1:
                channels = {weight: torch.zeros_like(digit) for weight, digit in digits.items()}
            channels = {w: _append(c, digits[w], place) for w, c in channels.items() if w in digits}
            if not channels:
                break
            place *= _BASE
        return {w: torch.where(c < producer.size, c, -1) for w, c in channels.items()}


def _slice_by_slice(fold: Fold) -> Iterator[Fold]:
    """A fold of a whole stack as one of each slice into its own readers."""
    producer = fold.producer
    indices = {reader.weight.index for reader in fold.readers}
    if producer.weight is None or indices == {None}:
        yield fold
        return
    for index in indices - {None}:
        own = replace(producer, weight=replace(producer.weight, index=index))
        yield Fold(own, tuple(reader for reader in fold.readers if reader.weight.index == index))


def _exponent(digit: Tensor) -> Tensor:
    return (digit - _BASE // 2 + (digit >= _BASE // 2).long()).float()


def _answers(producer: Producer, before: Trace, after: Trace) -> dict[Weight, Tensor]:
    """For each weight whose input answers cleanly: the digit that every input channel shows, -1 if silent."""
    answers: dict[Weight, Tensor | None] = {}
    for a, b in _paired(before, after):
        shown = None if _is_own(producer, a.weight) else _digits(a.x, b.x)
        # A weight that is used twice has to answer alike both times.
        alike = a.weight not in answers or _alike(answers[a.weight], shown)
        answers[a.weight] = shown if alike else None
    return {weight: shown for weight, shown in answers.items() if shown is not None}


def _is_own(producer: Producer, weight: Weight) -> bool:
    return producer.weight in (weight, replace(weight, index=None))


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _append(channels: Tensor, digit: Tensor, place: int) -> Tensor:
    return torch.where((channels < 0) | (digit < 0), -torch.ones_like(channels), channels + digit * place)


def _paired(before: Trace, after: Trace) -> Iterator[tuple[Product, Product]]:
    """Products of the same weight in two runs; none if the runs took different ways."""
    if [p.weight for p in before.products] != [p.weight for p in after.products]:
        return
    for a, b in zip(before.products, after.products, strict=True):
        if a.x.shape == b.x.shape:
            yield a, b


def _digits(before: Tensor, after: Tensor) -> Tensor | None:
    """Per channel the digit by which it was scaled on all tokens; -1 where it is always zero or never scaled.

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
    scaled_alike = bool((highest == lowest)[alive].all()) and bool(((exponent - whole).abs() < 1e-3).all())
    if not scaled_alike or bool((highest[alive].abs() > _BASE // 2).any()):
        return None
    digit = highest + _BASE // 2 - (highest > 0).float()
    return torch.where(alive & (highest != 0), digit, -1.0).long()


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
