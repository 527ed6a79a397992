"""Which linears are quantized, and how large the result will be: decided before the first weight is read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from .checkpoint import StreamedModel
from .checkpoint.streamed import transposed_linears
from .errors import SchemeError
from .scheme import Scheme


@dataclass(frozen=True, slots=True)
class Plan:
    """chosen: names of the linears to quantize. ignored: names of all others. nbytes: tensor data of the result."""

    chosen: frozenset[str]
    ignored: tuple[str, ...]
    nbytes: int


def make_plan(
    source: StreamedModel, scheme: Scheme | None, ignore: Sequence[str] | None, transposed: bool = False
) -> Plan:
    """Choose the linears of a model's blocks, and its output head, that no pattern of `ignore` matches.

    scheme: None chooses nothing, for smoothing alone. ignore: names, globs, or `re:` patterns that match from the
    start; None for the output head and routers. transposed: as for `quantizable`. Raises SchemeError if a pattern
    matches nothing, if nothing is left, or if the scheme does not fit a linear.
    """
    if scheme is None:
        return Plan(frozenset(), (), source.checkpoint.nbytes)
    linears = dict(quantizable(source, transposed))
    patterns = [source.head_name, *routers(source, linears)] if ignore is None else list(ignore)
    matched = {p: {name for name in linears if matches(p, name)} for p in patterns}
    for pattern, names in matched.items():
        if not names:
            example = next(iter(linears))
            raise SchemeError(f"ignore pattern {pattern!r} matches no linear; names look like {example!r}")
    chosen = frozenset(linears) - frozenset().union(*matched.values())
    if not chosen:
        raise SchemeError(_nothing_left(source, transposed))
    if scheme.is_static and any(len(linears[name]) == 3 for name in chosen):
        raise SchemeError(
            f"scheme {scheme.name} fixes input scales, which experts do not share: use w8a8 here"
        )
    for name in sorted(chosen):
        try:
            scheme.weight.scale_shape(linears[name])
        except SchemeError as error:
            raise SchemeError(f"{name}: {error}; or leave it out with --ignore {name}") from None
    every = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    # By both names where the file's and the model's differ: one engine looks for these, another for those.
    left = [{name: None, source.names.source_module(name): None} for name in every if name not in chosen]
    ignored = tuple(name for names in left for name in names)
    return Plan(chosen, ignored + unused_modules(source), _nbytes(source, scheme, linears, chosen))


def _nothing_left(source: StreamedModel, transposed: bool) -> str:
    if transposed_linears(source.model) and not transposed:
        return "this model's linears store (in, out), which only --format qlinear can hold quantized: ask for that"
    return "ignore leaves nothing to quantize: drop a pattern"


def quantizable(source: StreamedModel, transposed: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What can be quantized of a model's blocks, and its output head: name and shape, (out, in).

    transposed: with linears that store (in, out). Experts that the model stacks and the file holds one by one are
    named by their parameter, of shape (experts, out, in).
    """
    inside = tuple(f"{name}." for name in text_blocks(source))
    other = transposed_linears(source.model) if transposed else {}
    for name, module in source.model.named_modules():
        if isinstance(module, nn.Linear) and (name.startswith(inside) or module is source.head):
            yield name, (module.out_features, module.in_features)
        elif name in other and name.startswith(inside):
            rows, columns = module.get_parameter("weight").shape
            yield name, (columns, rows)
    for name, parameter in source.model.named_parameters():
        if parameter.dim() == 3 and name.startswith(inside) and _is_stack(source, name):
            yield name, tuple(parameter.shape)


def _is_stack(source: StreamedModel, name: str) -> bool:
    """Whether a parameter is made of matrices that are linears of their own in the file."""
    sources = source.names.sources(name)
    return len(sources) > 1 and all(
        key.endswith(".weight") and len(source.checkpoint.info(key).shape) == 2 for key in sources
    )


def routers(source: StreamedModel, linears: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linears that choose among experts, or weigh a shared one: they have one output per expert beside them."""
    experts: dict[str, int] = {}
    for name, module in source.model.named_modules():
        stacks = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        count = len(module) if isinstance(module, nn.ModuleList) else stacks[0] if stacks else 0
        if count > 1:
            experts[name.rpartition(".")[0]] = count
    parents = {name: name.rpartition(".")[0] for name in linears}
    near = {name: (experts.get(parents[name]), linears[name][-2]) for name in linears}
    return [name for name, (count, rows) in near.items() if count is not None and rows in (1, count)]


def text_blocks(source: StreamedModel) -> list[str]:
    """Names of the blocks that a text passes through: those of a vision or audio tower are left as they are."""
    decoder = source.model.get_decoder()  # type: ignore[no-untyped-call]
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return [name for name, block in source.blocks.items() if id(block) in inside] or list(source.blocks)


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


def _nbytes(
    source: StreamedModel, scheme: Scheme, shapes: Mapping[str, tuple[int, ...]], chosen: frozenset[str]
) -> int:
    grown = (quantized_bytes(scheme, shapes[name]) - replaced_bytes(source, name) for name in chosen)
    return source.checkpoint.nbytes + sum(grown)


def quantized_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Of the codes and scales of a weight."""
    return prod(shape) * scheme.weight.bits // 8 + 4 * prod(scheme.weight.scale_shape(shape))


def replaced_bytes(source: StreamedModel, name: str) -> int:
    """Of what a quantized weight takes the place of in the file: nothing for a tied head, whose embedding stays."""
    if is_parameter(source, name):
        return sum(source.checkpoint.info(key).nbytes for key in source.names.sources(name))
    own = source.checkpoint.tensors.get(f"{source.names.source_module(name)}.weight")
    return own.nbytes if own else 0


def is_parameter(source: StreamedModel, name: str) -> bool:
    """Whether a name is that of a parameter, a stack of experts, rather than of a module."""
    owner, _, leaf = name.rpartition(".")
    return leaf in source.model.get_submodule(owner)._parameters
