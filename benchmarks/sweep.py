"""One architecture smoothed in memory, block by block, and what came of it: the sweep of `test_architectures`.

A few channels of every norm are made twenty times larger first, as they come in trained models, so that smoothing has
something to do.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from benchmarks.small_models import classes, small_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlinear.algorithms import get_algorithm
from qlinear.calibration.collect import calibrate
from qlinear.errors import QLinearError
from qlinear.formats.scheme import get_scheme
from qlinear.nn import QLinear
from qlinear.pipeline.block import Block, BlockStats
from qlinear.pipeline.options import Options
from qlinear.pipeline.quantize_block import quantize_block
from qlinear.streaming.find_blocks import find_blocks, shared_parameters
from qlinear.streaming.lanes import Lane, Lanes, batches_of
from qlinear.tracing.folds import Fold, InputGroup, find_groups
from qlinear.tracing.on_meta import weights_used_as_floats
from qlinear.tracing.proof import find_and_prove_folds

TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
# What W8A8 is measured on: many more, for what few tokens lose is mostly chance.
EVALUATED = torch.randint(3, 128, (64, 32), generator=torch.Generator().manual_seed(2))
LARGER, CHANNELS = 20.0, (3, 17)
_OF_ATTENTION = re.compile(r"\b[qk]_?(layer)?norm")
_CONTRACTIONS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"}
CLASSES = {config_class.__name__.removesuffix("Config"): config_class for config_class in classes()}


@dataclass(slots=True)
class Swept:
    """What became of a model.

    difference: of the smoothed model's logits, relative. linears, others: how many nn.Linears, and other weights that
    multiply (experts, Conv1D, raw parameters), its blocks have, and how many of each were folded. kept: the names of
    the rest. unread: parameters that multiply otherwise than linear layers do, and are named to the user. missed: those
    that multiply and are in no group, nor unread. plain, smoothed: relative error of the logits in
    W8A8, without smoothing and with it; None if the model does not let its linears be replaced.
    """

    difference: float = 0.0
    linears: tuple[int, int] = (0, 0)
    others: tuple[int, int] = (0, 0)
    kept: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)
    plain: float | None = None
    smoothed: float | None = None


@cache
def sweep(name: str, seed: int = 0) -> Swept:
    """Build an instance of the class, smooth it, and compare."""
    model = small_model(CLASSES[name], seed)
    inputs, evaluated = _inputs(model, TOKENS), _inputs(model, EVALUATED)
    _plant(model, inputs)
    expected, called, multiplied = _run(model, inputs)
    called -= {model.get_submodule(name) for name in weights_used_as_floats(model, find_blocks(model))}
    exact = _logits(model, evaluated)
    swept = Swept(plain=_w8a8(model, evaluated, exact, called, {}))
    kept = _smooth(model, swept, multiplied)
    swept.difference = _difference(_logits(model, inputs), expected)
    swept.smoothed = _w8a8(model, evaluated, exact, called, kept)
    return swept


def _plant(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Make some channels of the norms large, where the model can bear it: rounding alone must not move its logits."""
    gains = [
        p for block in find_blocks(model).values() for n, p in block.named_parameters() if _is_gain(n, p)
    ]
    saved = [gain.detach().clone() for gain in gains]
    with torch.no_grad():
        for gain in dict.fromkeys(gains):
            gain[list(CHANNELS)] *= LARGER
        if _sensitivity(model, inputs) > 1e-5:
            for gain, before in zip(gains, saved, strict=True):
                gain.copy_(before)


def _is_gain(name: str, parameter: Tensor) -> bool:
    large_enough = parameter.dim() == 1 and len(parameter) > max(CHANNELS)
    return large_enough and name.endswith("weight") and not _OF_ATTENTION.search(name)


def _sensitivity(model: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    """How far the logits move, relatively, when every weight moves by a rounding error."""
    before = _logits(model, inputs)
    saved = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in saved:
        parameter.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(parameter.shape, generator=generator))
    moved = _difference(_logits(model, inputs), before)
    for parameter, value in saved.items():
        parameter.copy_(value)
    return moved


def _inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
    """What the model is called with; the decoder of an encoder-decoder gets something to attend to."""
    inputs = batches_of(tokens, len(tokens))[0]
    cross = any("encoder_attn" in name or "cross_attn" in name for name, _ in model.named_modules())
    if cross and "encoder_hidden_states" in inspect.signature(model.forward).parameters:
        generator = torch.Generator().manual_seed(len(tokens))
        width = getattr(model.config, "cross_attention_hidden_size", None) or model.config.hidden_size
        inputs["encoder_hidden_states"] = torch.randn(len(tokens), 6, width, generator=generator)
    return inputs


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class _Contracted(TorchFunctionMode):
    """Notes which parameters torch's contractions take, themselves or a view: seen without the package's help."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters() if p.dim() > 1}
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _CONTRACTIONS:
            factors = args[1:] if "add" in func.__name__ else args
            read = [leaf for leaf in tree_leaves(factors) if isinstance(leaf, Tensor)]
            names = {self._names.get(t.untyped_storage().data_ptr()) for t in read}
            self.names |= {name for name in names if name is not None}
        return func(*args, **(kwargs or {}))


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, set[nn.Module], set[str]]:
    """The logits, the linears that were called as modules, and the names of the parameters that multiplied."""
    called: set[nn.Module] = set()
    handles = [
        m.register_forward_hook(lambda module, args, output: called.add(module))
        for m in model.modules()
        if type(m) is nn.Linear
    ]
    with _Contracted(model) as contracted:
        logits = _logits(model, inputs)
    for handle in handles:
        handle.remove()
    return logits, called, contracted.names


def _smooth(model: PreTrainedModel, swept: Swept, multiplied: set[str]) -> dict[nn.Module, Tensor]:
    """Smooth every block as the job does, without rounding; returns what stays with linears that nothing folds."""
    blocks, head = find_blocks(model), model.get_output_embeddings()
    names, shared = {id(block): name for name, block in blocks.items()}, shared_parameters(blocks.values())
    batches = [_inputs(model, TOKENS.flatten()[:32].unsqueeze(1)), _inputs(model, TOKENS[:2, :16])]
    batches += [_inputs(model, rows) for rows in TOKENS.split(4)]
    kept: dict[nn.Module, Tensor] = {}
    grouped: set[str] = set()
    visited: set[str] = set()
    previous_folds: list[Fold] = []
    with torch.no_grad(), Lanes(model, [*blocks.values(), head], batches) as lanes:
        while (block := lanes.at) is not None and block is not head:
            name = names[id(block)]
            previous_folds, groups, vectors, unread = smooth_block(
                name, block, list(lanes), previous_folds, shared[block]
            )
            swept.unread |= {f"{name}.{parameter}" for parameter in unread}
            if name not in visited:
                _count(block, groups, swept, name)
            visited.add(name)
            grouped |= {f"{name}.{weight.name}" for group in groups for weight in group.weights}
            kept |= vectors
    inside = tuple(f"{name}." for name in visited)
    swept.missed = {name for name in multiplied if name.startswith(inside)} - grouped - swept.unread
    return kept


def smooth_block(
    name: str, block: nn.Module, lanes: list[Lane], previous: list[Fold], shared: frozenset[str]
) -> tuple[list[Fold], list[InputGroup], dict[nn.Module, Tensor], frozenset[str]]:
    """Smooth a block with the job's own `quantize_block`, rounding nothing.

    Returns the folds, all groups, the vectors that stay with linears, and the parameters that could not be read.
    """
    probe, proof, *calibration = lanes
    trace, folds = find_and_prove_folds(block, probe.waiting, proof.waiting, previous, shared)
    stats = calibrate(block, [*calibration, probe, proof], trace)
    traced = Block(name, block, lambda key: torch.float32, tuple(find_groups(trace, folds)))
    holders = frozenset(traced.full_name(weight) for weight in traced.weights() if weight.index is None)
    options = Options(None, get_algorithm("rtn"), holders=holders)
    result = quantize_block(traced, BlockStats(stats, is_measured=True), options)
    result.smoothing.apply_to(block)
    kept = {block.get_submodule(w.module): vector for w, vector in result.smoothing.migration.items()}
    return folds, list(traced.groups), kept, trace.unread


def _count(block: nn.Module, groups: list[InputGroup], swept: Swept, name: str) -> None:
    for group in groups:
        folded = group.fold is not None
        for weight in group.weights:
            is_linear = isinstance(block.get_submodule(weight.module), nn.Linear)
            some, all_of = swept.linears if is_linear else swept.others
            counts = (some + folded, all_of + 1)
            swept.linears, swept.others = (counts, swept.others) if is_linear else (swept.linears, counts)
            if not folded:
                swept.kept.append(
                    f"{name}.{weight.name}" + ("" if weight.index is None else f"[{weight.index}]")
                )


def _w8a8(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    expected: Tensor,
    called: set[nn.Module],
    kept: Mapping[nn.Module, Tensor],
) -> float | None:
    """The error of the logits with every linear of the blocks that is called as one in W8A8."""
    try:
        with _quantized(model, called, kept):
            return _difference(_logits(model, inputs), expected)
    except (
        AttributeError,
        TypeError,
        QLinearError,
    ):  # the model reaches into its linears for a weight, or its dtype
        return None


@contextmanager
def _quantized(
    model: PreTrainedModel, called: set[nn.Module], kept: Mapping[nn.Module, Tensor]
) -> Iterator[None]:
    replaced = []
    for block in dict.fromkeys(find_blocks(model).values()):
        for parent in list(block.modules()):
            for name, child in list(parent._modules.items()):
                if child in called:
                    parent._modules[name] = QLinear.from_float(
                        child, get_scheme("w8a8"), None, kept.get(child)
                    )
                    replaced.append((parent, name, child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child
