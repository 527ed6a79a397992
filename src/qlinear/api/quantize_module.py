"""`qlinear.quantize_`: quantizes the linear layers of any module in memory, in place.

1. The module runs on the example inputs. Hooks record which weights multiply what (`_run`).
2. Layers are recognised. An `nn.Linear` is known by its type. Any other module with a weight of its own (a raw `W`,
   transformers' Conv1D) is compared with the linear layer that it would be (`_recognised`).
3. Each layer is rounded, smoothed on request, and replaced by a `QLinear`.

Matrices that multiply something and belong to no linear layer stay in float. The result names them, with the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..algorithms.smoothquant import smoothing_scale, weight_statistic
from ..calibration.stats import InputStats, StatsCollector
from ..errors import SchemeError, StructureError
from ..formats.name_patterns import matches_any
from ..formats.scheme import Scheme, get_scheme, require_fit
from ..nn import QLinear
from ..nn.encoder_fast_path import disable_fast_paths
from ..tracing.trace import Weight, watching_inputs

_SAMPLE = 256
# Functions that read a parameter, or ask about it, without multiplying by it.
_HARMLESS = frozenset({"embedding", "embedding_bag", "__get__", "size", "dim", "numel", "is_floating_point"})
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class InPlace:
    """The result. replaced: names of the layers that are quantized now. left: the parameters that multiply something
    and are still float, by name, each with the reason."""

    module: nn.Module
    replaced: tuple[str, ...]
    left: Mapping[str, str]


@dataclass(slots=True)
class _Seen:
    """What the examples showed. stats: of each weight's input. groups: the weights that read one tensor, by its
    address, shape and version. calls: arguments and output of each module's first call. uses: the functions that took a
    parameter, by its id."""

    stats: dict[Weight, StatsCollector] = field(default_factory=dict)
    groups: dict[tuple[Any, ...], list[Weight]] = field(default_factory=dict)
    calls: dict[nn.Module, tuple[Any, Any]] = field(default_factory=dict)
    uses: dict[int, set[str]] = field(default_factory=dict)


def quantize_(
    module: nn.Module,
    scheme: str | Scheme = "w8a8",
    example_inputs: Any = None,
    *,
    smooth: float | None = None,
    ignore: Sequence[str] = (),
) -> InPlace:
    """Quantize the linear layers of a module in place, rounding to nearest.

    example_inputs: what the module is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or a
    list of any of these, one call each. Needed for static activations, for smoothing, and to recognise layers that
    are no nn.Linear. smooth: the α of SmoothQuant, None for none; the vectors stay with their layers as migration
    scales, one for all layers that read the same tensor. ignore: patterns of layer names to leave alone.

    Raises SchemeError, before anything changes, where the scheme does not fit a layer or needs examples that are not
    given, and StructureError where the module is itself the layer, which cannot be replaced in place.
    """
    scheme = get_scheme(scheme)
    seen = _run(module, _calls(example_inputs)) if example_inputs is not None else _Seen()
    layers = {name: linear for name, linear in _linears(module, seen) if not matches_any(ignore, name)}
    _check(layers, scheme, example_inputs is not None, smooth)
    weights = {name: _weight_of(seen, name) for name in layers}
    stats = {
        name: seen.stats[w].stats(name) for name, w in weights.items() if w is not None and _ran(seen, w)
    }
    if scheme.is_static:
        layers = {name: layer for name, layer in layers.items() if name in stats}
    scales = {} if smooth is None else _smoothing(layers, weights, stats, seen, smooth)
    _replace(
        module,
        {n: QLinear.from_float(layer, scheme, stats.get(n), scales.get(n)) for n, layer in layers.items()},
    )
    disable_fast_paths(module)
    return InPlace(module, tuple(layers), _reasons(module, seen if example_inputs is not None else None))


def _calls(example_inputs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    batches = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    return [
        ((), dict(batch))
        if isinstance(batch, Mapping)
        else (batch if isinstance(batch, tuple) else (batch,), {})
        for batch in batches
    ]


class _Uses(TorchFunctionMode):
    """Records the name of every function that takes one of the parameters, alone or in a list."""

    def __init__(self, parameters: set[int], uses: dict[int, set[str]]) -> None:
        super().__init__()
        self._parameters, self._uses = parameters, uses

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = "dtype" if func == _DTYPE else getattr(func, "__name__", str(func))
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._parameters:
                self._uses.setdefault(id(leaf), set()).add(name)
        return func(*args, **(kwargs or {}))


def _run(module: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> _Seen:
    """Run the examples through the module in evaluation mode, and record what multiplies what."""
    seen, alive = _Seen(), []

    def note(weight: Weight, x: Tensor) -> None:
        if weight not in seen.stats:
            seen.stats[weight] = StatsCollector(_SAMPLE)
            alive.append(x)  # keeps the address from being reused by another tensor
            seen.groups.setdefault((x.data_ptr(), x.shape, x._version), []).append(weight)
        seen.stats[weight].update(x.detach())

    matrices = {id(p) for p in module.parameters() if p.dim() > 1}
    with torch.no_grad(), _evaluating(module), _hooked(module, seen), watching_inputs(module, note):
        for args, kwargs in calls:
            with _Uses(matrices, seen.uses):
                module(*args, **kwargs)
    return seen


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


@contextmanager
def _hooked(module: nn.Module, seen: _Seen) -> Iterator[None]:
    """Context manager: records arguments and output of the first call of each child that owns a matrix."""

    def keep(child: nn.Module, args: Any, output: Any) -> None:
        seen.calls.setdefault(child, (args, output))

    owners = [m for m in module.modules() if any(p.dim() == 2 for p in m.parameters(recurse=False))]
    handles = [owner.register_forward_hook(keep) for owner in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linears(module: nn.Module, seen: _Seen) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that can be replaced, by name: each as an nn.Linear that computes the same."""
    for name, child in module.named_modules():
        linear = child if type(child) is nn.Linear else _recognised(child, _weight_of(seen, name), seen)
        # Code that casts an input to its weight's dtype would cast it to the codes' dtype.
        if linear is None or any("dtype" in seen.uses.get(id(p), ()) for p in child.parameters()):
            continue
        if name == "":
            raise StructureError(
                "the module is itself a linear layer, which cannot be replaced in place: use QLinear.from_float"
            )
        yield name, linear


def _weight_of(seen: _Seen, name: str) -> Weight | None:
    """The weight of this module that multiplied, if there is exactly one."""
    weights = {weight for weight in seen.stats if weight.module == name}
    return weights.pop() if len(weights) == 1 else None


def _ran(seen: _Seen, weight: Weight) -> bool:
    """Whether an example reached this weight."""
    return weight in seen.stats and seen.stats[weight].tokens > 0


def _recognised(owner: nn.Module, weight: Weight | None, seen: _Seen) -> nn.Linear | None:
    """The nn.Linear that computes what `owner` computed on the examples, or None."""
    args, output = seen.calls.get(owner, ((), None))
    if weight is None or weight.index is not None or len(args) != 1 or not isinstance(output, Tensor):
        return None
    x, others = args[0], dict(owner.named_parameters())
    stored = others.pop(weight.name.rpartition(".")[2], None)
    if stored is None or not isinstance(x, Tensor) or any(p.dim() > 1 for p in others.values()):
        return None
    matrix = stored.detach().mT if weight.transposed else stored.detach()
    for bias in (None, *others.values()):
        if bias is None or bias.shape == matrix.shape[:1]:
            linear = _linear(matrix, bias)
            if _same(linear, x, output):
                return linear.train(owner.training)
    return None


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _same(linear: nn.Linear, x: Tensor, output: Tensor) -> bool:
    """Whether the layer gives this output, up to the rounding of its dtype."""
    if x.shape[-1:] != (linear.in_features,) or output.shape != (*x.shape[:-1], linear.out_features):
        return False
    bias = None if linear.bias is None else linear.bias.double()
    y = F.linear(x.double(), linear.weight.double(), bias)
    return bool((y - output.double()).norm() <= 8 * torch.finfo(output.dtype).eps * y.norm())


def _check(layers: Mapping[str, nn.Linear], scheme: Scheme, examples: bool, smooth: float | None) -> None:
    if not examples and (scheme.is_static or smooth is not None):
        what = "static activations are" if scheme.is_static else "smoothing is"
        raise SchemeError(f"{what} chosen from the layers' inputs: give example_inputs to measure them on")
    for name, linear in layers.items():
        try:
            require_fit(scheme, linear.weight.shape)
        except SchemeError as error:
            raise SchemeError(f"{name}: {error}; or leave it out with ignore=[{name!r}]") from error


def _smoothing(
    layers: Mapping[str, nn.Linear],
    weights: Mapping[str, Weight | None],
    stats: Mapping[str, InputStats],
    seen: _Seen,
    alpha: float,
) -> dict[str, Tensor]:
    """Smoothing vectors by layer name; all layers that read one tensor share one."""
    name_of = {weight: name for name, weight in weights.items() if weight is not None}
    scales: dict[str, Tensor] = {}
    for group in seen.groups.values():
        names = [name_of[weight] for weight in group if weight in name_of and name_of[weight] in stats]
        if names:
            absmax = torch.stack([stats[name].absmax for name in names]).amax(0)
            columns = weight_statistic([layers[name].weight.detach() for name in names])
            scales |= dict.fromkeys(names, smoothing_scale(absmax, columns, alpha))
    return scales


def _replace(module: nn.Module, layers: Mapping[str, QLinear]) -> None:
    """Replace the child of each name, wherever in the module it stands."""
    by_child = {module.get_submodule(name): layer for name, layer in layers.items()}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in by_child:
                setattr(parent, name, by_child[child])


def _reasons(module: nn.Module, seen: _Seen | None) -> dict[str, str]:
    """The float matrices that multiply something, each with the reason. Without examples: all but embeddings."""
    embeddings = {
        id(p)
        for m in module.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters()
    }
    reasons = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        if seen is None:
            if id(parameter) not in embeddings:
                reasons[name] = (
                    "not the weight of an nn.Linear; example_inputs would show whether it acts as one"
                )
            continue
        functions = seen.uses.get(id(parameter), set()) - _HARMLESS
        if "dtype" in functions and type(module.get_submodule(name.rpartition(".")[0])) is nn.Linear:
            reasons[name] = "its dtype is asked for, and codes would give another answer"
        elif functions - {"dtype"}:
            reasons[name] = (
                f"goes into {', '.join(sorted(functions - {'dtype'}))}, and its module is no linear layer"
            )
        elif id(parameter) not in seen.uses:
            reasons[name] = "took no part in the examples"
    return reasons
