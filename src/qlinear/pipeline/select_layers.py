"""Which linears are quantized, and how large the result will be: decided before the first weight is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..errors import SchemeError
from ..formats.name_patterns import matches
from ..formats.scheme import Scheme, require_fit
from ..runtime.device import CPU
from ..streaming.plain_linear import is_plain_linear
from ..streaming.streamed_model import StreamedModel, compute_dtype, transposed_linears
from ..tracing.on_meta import groups_on_meta, weights_used_as_floats
from .float_modules import float_modules, float_stacks, starred, unused_weights

# A scheme, or None to leave a linear in float.
_Choice = Scheme | None
# How many ranks engines usually split a layer over.
_RANKS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Plan:
    """schemes: of the linears to quantize, by name. ignored: names of all others. nbytes: tensor data of the result.

    notes: what a user should know of the choice. holders: the linears that can hold a smoothing vector: those to
    quantize; where nothing is quantized, those that the model does no more with than call.
    """

    schemes: Mapping[str, Scheme]
    ignored: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()
    holders: frozenset[str] = frozenset()

    @property
    def chosen(self) -> frozenset[str]:
        """The linears to quantize."""
        return frozenset(self.schemes)


def make_plan(
    source: StreamedModel,
    scheme: Scheme | None,
    ignore: Sequence[str] | None,
    transposed: bool = False,
    scheme_for: Mapping[str, Scheme] | None = None,
) -> Plan:
    """Choose the linears of a model's blocks, and its output head, that no pattern of `ignore` matches.

    scheme: None chooses nothing, for smoothing alone. ignore: names, globs, or `re:` patterns that match from the
    start; None for the output head and routers. transposed: as for `quantizable`. scheme_for: other schemes by
    pattern, the last that matches counts. What engines merge (q, k and v; gate and up) is chosen as one. Raises
    SchemeError if a pattern matches nothing or contradicts another, if nothing is left, or if a scheme does not fit.
    """
    if scheme is None:
        return Plan({}, (), source.checkpoint.nbytes, holders=_float_holders(source))
    linears = dict(quantizable(source, transposed))
    rules = _rules(source, linears, ignore, scheme_for or {})
    groups = merge_groups(source) if ignore or scheme_for else []
    explicit, notes = _explicit(linears, rules, groups)
    choices = {name: explicit.get(name, scheme) for name in linears}
    schemes = {name: choice for name, choice in choices.items() if choice is not None}
    schemes, cast_to = _without_consulted(source, schemes)
    if not schemes:
        raise SchemeError(_nothing_left(source, transposed))
    for name in sorted(schemes):
        _require_fit(name, linears[name], schemes[name])
    return Plan(
        schemes, float_modules(source, schemes), _nbytes(source, linears, schemes),
        (*notes, *cast_to, *_stay_in_float(source, schemes), *_cut_by_ranks(linears, schemes)), frozenset(schemes),
    )  # fmt: skip


# A pattern, what it chooses, and the flag that it came with.
_Rule = tuple[str, _Choice, str]


def _rules(
    source: StreamedModel,
    linears: Mapping[str, tuple[int, ...]],
    ignore: Sequence[str] | None,
    scheme_for: Mapping[str, Scheme],
) -> list[_Rule]:
    """What patterns choose, the weakest first: `ignore` counts most.

    Without `ignore` the head and routers stay in float, but for a pattern of `scheme_for` that matches nothing else: it
    means them.
    """
    rules: list[_Rule] = [(pattern, scheme, "scheme-for") for pattern, scheme in scheme_for.items()]
    if ignore is not None:
        return [*rules, *((pattern, None, "ignore") for pattern in ignore)]
    floats = [source.head_name, *routers(source, linears)]
    meant = [rule for rule in rules if {n for n in linears if matches(rule[0], n)} <= {*floats}]
    return [*rules, *((name, None, "ignore") for name in floats), *meant]


def _explicit(
    linears: Mapping[str, tuple[int, ...]], rules: Sequence[_Rule], groups: Sequence[Sequence[str]]
) -> tuple[dict[str, _Choice], list[str]]:
    """What the rules choose for single linears, extended to what engines merge; and notes on what was extended."""
    merged_with = {name: group for group in groups for name in group}
    explicit: dict[str, _Choice] = {}
    extended: dict[str, None] = {}
    for pattern, choice, flag in rules:
        names = [name for name in linears if matches(pattern, name)]
        if not names:
            example = next(iter(linears))
            raise SchemeError(f"{flag} pattern {pattern!r} matches no linear; names look like {example!r}")
        others = {other for name in names for other in merged_with.get(name, ())}.difference(names)
        explicit |= dict.fromkeys((*names, *others), choice)
        extended |= dict.fromkeys(sorted(others))
    note = f"{', '.join(extended)}: chosen with what engines merge them with"
    return explicit, [note] if extended else []


def merge_groups(source: StreamedModel) -> list[list[str]]:
    """Linears that engines merge into one: those of one module that read the same tensor."""
    twin = StreamedModel(source.checkpoint, torch.float32, source.trust_remote_code)
    members: dict[tuple[str, int, str], list[str]] = {}
    for block, groups in groups_on_meta(twin.model, twin.blocks, twin.head).items():
        for i, group in enumerate(groups):
            for weight in dict.fromkeys(w for w in group.weights if w.index is None):
                key = (block, i, weight.module.rpartition(".")[0])
                members.setdefault(key, []).append(f"{block}.{weight.module}")
    return [names for names in members.values() if len(names) > 1]


def _without_consulted(
    source: StreamedModel, schemes: Mapping[str, Scheme]
) -> tuple[dict[str, Scheme], list[str]]:
    """The schemes without those of linears whose weights the model needs as floats, and a note that names them."""
    asked = _asked_for(source)
    left = [name for name in schemes if name in asked]
    note = f"{', '.join(left)}: left in float, as the model asks for the dtype of their weights, or rescales them"
    return {name: scheme for name, scheme in schemes.items() if name not in asked}, [note] if left else []


def _float_holders(source: StreamedModel) -> frozenset[str]:
    """The float linears that can divide their input by a vector; stacks cannot, and routers gain nothing by it."""
    linears = {name: shape for name, shape in quantizable(source) if len(shape) == 2}
    return frozenset(linears) - _asked_for(source) - frozenset(routers(source, linears))


def _asked_for(source: StreamedModel) -> frozenset[str]:
    """The linears whose weights the model does more with than call them."""
    twin = StreamedModel(source.checkpoint, compute_dtype(source.dtype, CPU), source.trust_remote_code)
    return weights_used_as_floats(twin.model, twin.blocks)


def _require_fit(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    if scheme.is_static and len(shape) == 3:
        raise SchemeError(
            f"scheme {scheme.name} fixes input scales, which experts do not share: use w8a8 here"
        )
    try:
        require_fit(scheme, shape)
    except SchemeError as error:
        fitting = "fp8" if scheme.weight.is_float else "w4a16-channel"
        raise SchemeError(
            f"{name}: {error} (--scheme-for '{name}={fitting}'), or leave it out with --ignore {name}"
        ) from None


def _cut_by_ranks(linears: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme]) -> list[str]:
    """A note for each width that a split over ranks would cut within a group."""
    cut: dict[tuple[int, int], list[int]] = {}
    for name, scheme in schemes.items():
        width, size = linears[name][-1], scheme.weight.group_size
        if size is not None:
            cut[width, size] = [ranks for ranks in _RANKS if width % ranks == 0 and width // ranks % size]
    return [
        f"inputs of {width} channels split over {' or '.join(map(str, ranks))} ranks would cut groups of {size}: "
        f"there, engines need a group size that divides {width // max(ranks)}"
        for (width, size), ranks in cut.items()
        if ranks
    ]


def _stay_in_float(source: StreamedModel, schemes: Mapping[str, Scheme]) -> list[str]:
    """Notes on the stacked experts that stay in float, and on weights of the file that the text model does not use."""
    stacks = [name for name in float_stacks(source, schemes) if not _is_stack(source, name)]
    unused = unused_weights(source)
    size = sum(source.checkpoint.info(name).nbytes for name in unused) / 1e9
    notes = [
        f"adapter in {'the folder itself' if name == '.' else name}: left out; merge it into the source to have it"
        for name in source.checkpoint.adapters()
    ]
    if stacks:
        notes.append(
            f"{', '.join(starred(stacks))}: left in float, as the file holds all experts of a layer in one tensor"
        )
    if unused:
        tops = ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" for name in unused))
        notes.append(
            f"{tops}: {len(unused)} weights ({size:.2f} GB) that the text model does not use, left in float"
        )
    return notes


def _nothing_left(source: StreamedModel, transposed: bool) -> str:
    if transposed_linears(source.model) and not transposed:
        return "this model's linears store (in, out), which only --format qlinear or lmdeploy holds quantized"
    return "ignore leaves nothing to quantize: drop a pattern"


def quantizable(source: StreamedModel, transposed: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What can be quantized of a model's blocks, and its output head: name and shape, (out, in).

    transposed: with linears that store (in, out). Experts that the model stacks and the file holds one by one are
    named by their parameter, of shape (experts, out, in).
    """
    inside = tuple(f"{name}." for name in text_blocks(source))
    other = transposed_linears(source.model) if transposed else {}
    for name, module in source.model.named_modules():
        if isinstance(module, nn.Linear) and not (is_plain_linear(module) and _name_in_file(source, name)):
            continue  # it does more than a product, or has no tensor of its own in the file
        if isinstance(module, nn.Linear) and (name.startswith(inside) or module is source.head):
            yield name, (module.out_features, module.in_features)
        elif name in other and name.startswith(inside):
            rows, columns = module.get_parameter("weight").shape
            yield name, (columns, rows)
    for name, parameter in source.model.named_parameters():
        if parameter.dim() == 3 and name.startswith(inside) and _is_stack(source, name):
            yield name, tuple(parameter.shape)


def _name_in_file(source: StreamedModel, name: str) -> list[str]:
    """What the file calls a linear; nothing where its weight is cut out of another tensor there."""
    return [source.names.source_module(name)] if source.names.is_one_tensor(name) else []


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


def _nbytes(
    source: StreamedModel, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, Scheme]
) -> int:
    grown = (quantized_bytes(s, shapes[name]) - replaced_bytes(source, name) for name, s in schemes.items())
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


def file_names(source: StreamedModel, name: str) -> list[str]:
    """The modules of the file that a linear, or a stack of experts, is there."""
    if is_parameter(source, name):
        return [key.removesuffix(".weight") for key in source.names.sources(name)]
    return [source.names.source_module(name)]
