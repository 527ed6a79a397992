"""Which linears are quantized, and how large the result will be: decided before the first weight is read."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from .checkpoint import StreamedModel
from .errors import SchemeError
from .scheme import Scheme


@dataclass(frozen=True, slots=True)
class Plan:
    """chosen: names of the linears to quantize. ignored: names of all others. nbytes: tensor data of the result."""

    chosen: frozenset[str]
    ignored: tuple[str, ...]
    nbytes: int


def make_plan(source: StreamedModel, scheme: Scheme | None, ignore: Sequence[str] | None) -> Plan:
    """Choose the linears of a model's blocks, and its output head, that no pattern of `ignore` matches.

    scheme: None chooses nothing, for smoothing alone. ignore: names, globs, or `re:` patterns that match from the
    start; None for the output head alone. Raises SchemeError if a pattern matches nothing, if nothing is left, or if
    the scheme does not fit a linear.
    """
    if scheme is None:
        return Plan(frozenset(), (), source.checkpoint.nbytes)
    patterns = [source.head_name] if ignore is None else list(ignore)
    linears = dict(quantizable(source))
    matched = {p: {name for name in linears if matches(p, name)} for p in patterns}
    for pattern, names in matched.items():
        if not names:
            example = next(iter(linears))
            raise SchemeError(f"ignore pattern {pattern!r} matches no linear; names look like {example!r}")
    chosen = frozenset(linears) - frozenset().union(*matched.values())
    if not chosen:
        raise SchemeError("ignore leaves nothing to quantize: drop a pattern")
    for name in sorted(chosen):
        try:
            scheme.weight.scale_shape((linears[name].out_features, linears[name].in_features))
        except SchemeError as error:
            raise SchemeError(f"{name}: {error}; or leave it out with --ignore {name}") from None
    every = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    # By both names where the file's and the model's differ: one engine looks for these, another for those.
    left = [{name: None, source.names.source_module(name): None} for name in every if name not in chosen]
    ignored = tuple(name for names in left for name in names)
    return Plan(chosen, ignored + unused_modules(source), _nbytes(source, scheme, chosen))


def quantizable(source: StreamedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linears inside a model's blocks, and its output head, by name."""
    inside = tuple(f"{name}." for name in source.blocks)
    for name, module in source.model.named_modules():
        if isinstance(module, nn.Linear) and (name.startswith(inside) or module is source.head):
            yield name, module


def matches(pattern: str, name: str) -> bool:
    """Whether a name, glob, or `re:` pattern (from the start, as in compressed-tensors) means this module."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise SchemeError(f"{pattern!r} is no regular expression: {error}") from None
    return name == pattern or fnmatchcase(name, pattern)


def unused_modules(source: StreamedModel) -> tuple[str, ...]:
    """Modules of the file that the text model does not have: engines that do have them must leave them in float."""
    matrices = (
        n for n in source.names.unused if n.endswith(".weight") and len(source.checkpoint.info(n).shape) == 2
    )
    return tuple(name.removesuffix(".weight") for name in matrices)


def _nbytes(source: StreamedModel, scheme: Scheme, chosen: frozenset[str]) -> int:
    total = source.checkpoint.nbytes
    for name in chosen:
        shape = tuple(source.model.get_parameter(f"{name}.weight").shape)
        codes = prod(shape) * scheme.weight.bits // 8 + 4 * prod(scheme.weight.scale_shape(shape))
        total += codes - replaced_bytes(source, name)
    return total


def replaced_bytes(source: StreamedModel, name: str) -> int:
    """Of what a quantized weight takes the place of in the file: nothing for a tied head, whose embedding stays."""
    own = source.checkpoint.tensors.get(f"{source.names.source_module(name)}.weight")
    return own.nbytes if own else 0
