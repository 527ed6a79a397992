"""The main job: a checkpoint in, a quantized checkpoint out, one decoder block in memory at a time.

    for each block, as the calibration set stands before it:
        load it  ·  find and prove its folds  ·  pass the set through it, gathering statistics
        smooth   ·  round                     ·  write what came out, and forget it

Everything that can be refused is refused before the first weight is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..algorithms import round_to_nearest
from ..blocks import Lane, batches_of
from ..calibrate import InputStats, absmax_of, calibrate
from ..checkpoint import Checkpoint, ShardWriter, StreamedModel
from ..checkpoint.layout import Layout, QuantizedLinear
from ..errors import StructureError
from ..nn import QLinear
from ..numerics import QuantizedTensor, qparams_from_range
from ..scheme import Scheme, TensorFormat
from ..smooth import Smoothing, group_scale
from ..structure import Fold, InputGroup, Producer, Weight, examine, find_groups

Progress = Callable[[str, int, int], None]
Migration = Literal["folded", "kept", "none"]
Keep = Literal["unfolded", "always", "never"]

# Tokens for experiments: many sequences of one token to find folds, a few real ones to prove them.
_PROBE, _PROOF = 32, (2, 16)
# Tokens that pass through a block at once: enough to fill a matrix product, few enough to stay small.
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of one linear.

    error: relative, of its output on calibration tokens (of its weight where there were none). migration: where its
    smoothing lives; folded_into: the module that took it. group: the first of the linears that read what it reads.
    """

    name: str
    error: float
    migration: Migration
    folded_into: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to the linears of a model.

    scheme: of those in `chosen`, by their names; None to smooth alone. alpha: of smoothing, None for none. layout:
    what the result is written as. migration_scale: which vectors stay with their layers: those that nothing can
    take ("unfolded"), all ("always") or none ("never").
    """

    scheme: Scheme | None
    chosen: frozenset[str]
    alpha: float | None
    layout: Layout
    migration_scale: Keep = "never"


@dataclass(slots=True)
class Findings:
    """What calibration found of a block: statistics of its inputs, their groups, and the smoothing that follows."""

    stats: Mapping[Weight, InputStats] = field(default_factory=dict)
    groups: Sequence[InputGroup] = ()
    smoothing: Smoothing = field(default_factory=Smoothing)

    def leader(self, weight: Weight) -> Weight | None:
        """The first of the weights that share this one's input."""
        return next((group.weights[0] for group in self.groups if weight in group.weights), None)


class Job:
    """Quantizes the linears of a model's blocks; `run` is the loop.

    recipe: what is done to each of them. tokens: the calibration set (n, seq_len), None where nothing needs it.
    """

    def __init__(
        self,
        source: StreamedModel,
        writer: ShardWriter,
        recipe: Recipe,
        tokens: Tensor | None,
        progress: Progress,
    ) -> None:
        self.source, self.writer, self.recipe = source, writer, recipe
        self.tokens, self.progress = tokens, progress
        self.layers: list[Layer] = []
        self.warnings: list[str] = []
        self._likely: Sequence[Fold] = ()
        self._written: set[str] = set()

    def run(self) -> None:
        """Every block, then what belongs to none."""
        if self.tokens is None:
            for block in self.source.blocks.values():
                with self._loaded(block):
                    self._write(block, Findings())
        else:
            self._run_calibrated(self.tokens)
        if self.source.head_name in self.recipe.chosen:
            with self._loaded(self.source.head):
                self._write(self.source.head, Findings())
        for name in self.source.checkpoint.tensors:
            if name not in self._written:
                self.writer.copy(name, self.source.checkpoint)
        self.progress("quantizing", len(self.source.blocks), len(self.source.blocks))
        self.writer.finish()

    def _run_calibrated(self, tokens: Tensor) -> None:
        with torch.no_grad(), self.source.lanes(micro_batches(tokens)) as lanes:
            while (block := lanes.at) is not None and block is not self.source.head:
                with self._loaded(block):
                    self._calibrated(block, *lanes)
            require_agreement(lanes[1], lanes[2], self.source.checkpoint)

    @contextmanager
    def _loaded(self, block: nn.Module) -> Iterator[None]:
        if block is not self.source.head:
            self.progress("quantizing", self.source.position(block), len(self.source.blocks))
        with self.source.loaded(block):
            yield

    def _calibrated(
        self, block: nn.Module, probe: Lane, proof: Lane, smoothed: Lane, *calibration: Lane
    ) -> None:
        trace, self._likely = examine(block, probe.waiting, proof.waiting, self._likely)
        stats = calibrate(block, calibration, trace, self.source.name_of(block))
        probe.step()
        proof.step()
        folds = [] if self.recipe.migration_scale == "always" else self._likely
        findings = Findings(stats, find_groups(trace, folds))
        if self.recipe.alpha is not None:
            self._smooth(block, findings, self.recipe.alpha)
        self._write(block, findings)
        smoothed.step()

    def _smooth(self, block: nn.Module, findings: Findings, alpha: float) -> None:
        # Last group first: dividing a linear's rows by what its readers take changes the largest magnitudes of its
        # columns, and so what the linear itself needs. The other way round nothing depends on anything.
        for group in reversed(findings.groups):
            s = self._vector(block, group, findings, alpha)
            if group.fold is not None:
                findings.smoothing.fold(block, group.fold, s, self._stored(block, group.fold.producer))
            elif self.recipe.migration_scale != "never":
                for weight in group.weights:
                    self._keep(block, weight, s, findings.smoothing)
            else:
                names = ", ".join(
                    _join(self.source.name_of(block), weight.module) for weight in group.weights
                )
                self.warnings.append(f"{names}: nothing can take the smoothing, left unsmoothed")

    def _keep(self, block: nn.Module, weight: Weight, s: Tensor, smoothing: Smoothing) -> None:
        """Leave the vector with a layer that will be a QLinear; what stays float has no place for it."""
        if weight.index is None and _join(self.source.name_of(block), weight.module) in self.recipe.chosen:
            smoothing.keep(weight, s)

    def _vector(self, block: nn.Module, group: InputGroup, findings: Findings, alpha: float) -> Tensor:
        """The smoothing vector of a group, from its weights as they are by now."""
        matrices = {weight: findings.smoothing.apply(weight, weight.of(block)) for weight in group.weights}
        return group_scale(group, matrices, absmax_of(findings.stats, group.weights), alpha)

    def _stored(self, block: nn.Module, producer: Producer) -> torch.dtype:
        """The dtype in which the file holds what a fold changes."""
        vector = producer.gain[0] if producer.weight is None else producer.weight.name
        return self.source.stored_dtype(f"{self.source.name_of(block)}.{vector}")

    def _write(self, block: nn.Module, findings: Findings) -> None:
        """Round what was chosen, and write the block: codes, what smoothing changed, and the rest as it was."""
        prefix, smoothing = self.source.name_of(block), findings.smoothing
        changed = set(smoothing.changed)
        for weight in _weights(block, findings):
            name, matrix = _join(prefix, weight.module), weight.of(block).detach()
            if weight.index is None and name in self.recipe.chosen:
                self._quantize(name, weight, smoothing.apply(weight, matrix), findings)
            elif smoothing.touches(weight):
                changed.add(weight.name)
            if smoothing.touches(weight):
                matrix.copy_(smoothing.apply(weight, matrix, kept=False))
        stacks = {name for name, _ in block.named_parameters() if _join(prefix, name) in self.recipe.chosen}
        for name in sorted(stacks):
            self._quantize_stack(_join(prefix, name), block.get_parameter(name).detach(), findings)
        self._write_float({_join(prefix, name): block.get_parameter(name) for name in changed - stacks})

    def _quantize(self, name: str, weight: Weight, matrix: Tensor, findings: Findings) -> None:
        scheme, smoothing, stats = self.recipe.scheme, findings.smoothing, findings.stats.get(weight)
        assert scheme is not None
        quantized = round_to_nearest(matrix, scheme, name)
        held = QuantizedLinear(scheme, quantized, migration_scale=smoothing.migration.get(weight))
        columns = smoothing.columns.get(weight, torch.ones((), device=matrix.device))
        if stats is not None and scheme.is_static and scheme.activation is not None:
            scale, zero_point = input_qparams(stats.min / columns, stats.max / columns, scheme.activation)
            held = replace(held, input_scale=scale, input_zero_point=zero_point)
        self._write_linear(self.source.names.source_module(name), held)
        error = output_error(matrix, held, None if stats is None else stats.sample.float() / columns)
        self.layers.append(self._layer(name, error, weight, findings))

    def _quantize_stack(self, name: str, stack: Tensor, findings: Findings) -> None:
        """Experts (experts, out, in) that the file holds one by one: each becomes a quantized linear there."""
        assert self.recipe.scheme is not None
        quantized = round_to_nearest(stack, self.recipe.scheme, name)
        codes = self.source.names.to_sources({name: quantized.codes})
        scales = self.source.names.to_sources({name: quantized.scale})
        zeros = (
            {} if quantized.zero_point is None else self.source.names.to_sources({name: quantized.zero_point})
        )
        for key, code in codes.items():
            one = QuantizedTensor(
                code.contiguous(), scales[key].contiguous(), zeros.get(key), quantized.format
            )
            self._write_linear(key.removesuffix(".weight"), QuantizedLinear(self.recipe.scheme, one))
        difference = quantized.dequantize() - stack
        first = next(
            (w for g in findings.groups for w in g.weights if name.endswith(f".{w.name}")), Weight(name)
        )
        error = float(difference.norm() / stack.float().norm().clamp(min=1e-30))
        layer = self._layer(name.rpartition(".")[0], error, first, findings)
        self.layers.append(replace(layer, name=name))

    def _write_linear(self, module: str, held: QuantizedLinear) -> None:
        """Write a quantized linear under the file's name for it, in place of its float weight."""
        for key, tensor in self.recipe.layout.pack(module, held).items():
            self.writer.add(key, tensor)
            self._written.add(key)
        self._written.add(f"{module}.weight")

    def _layer(self, name: str, error: float, weight: Weight, findings: Findings) -> Layer:
        block = name.removesuffix(weight.module)
        taken, leader = findings.smoothing.folded_into.get(weight), findings.leader(weight)
        where: Migration = "kept" if weight in findings.smoothing.migration else "folded" if taken else "none"
        return Layer(name, error, where, taken and block + taken, block + leader.module if leader else None)

    def _write_float(self, changed: Mapping[str, Tensor]) -> None:
        """Write parameters in the dtype that the source holds them in, under the source's names."""
        stored = {name: tensor.to(self.source.stored_dtype(name)) for name, tensor in changed.items()}
        for name, tensor in self.source.names.to_sources(stored).items():
            self.writer.add(name, tensor)
            self._written.add(name)


def micro_batches(tokens: Tensor) -> list[dict[str, Any]]:
    """The model calls of a job: one to experiment on, two alike to prove with, and the calibration set."""
    probe, proof = tokens.flatten()[:_PROBE].unsqueeze(1), tokens[: _PROOF[0], : _PROOF[1]]
    size = max(1, _BATCH_TOKENS // tokens.shape[1])
    return [*batches_of(probe, _PROBE), *batches_of(proof, len(proof)) * 2, *batches_of(tokens, size)]


def input_qparams(low: Tensor, high: Tensor, activation: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """The one static scale (1,) and zero point (1,) of an input, from each channel's extremes (in,)."""
    return qparams_from_range(low.amin().reshape(1), high.amax().reshape(1), activation)


def output_error(matrix: Tensor, held: QuantizedLinear, x: Tensor | None) -> float:
    """Relative error of a quantized linear's output on x (tokens, in); of its weight (out, in) if there is no x.

    x: what the layer's codes multiply: already divided by any smoothing vector.
    """
    if x is None:
        exact, actual = matrix, held.weight.dequantize()
    else:
        layer = QLinear.from_quantized(held.weight, None, held.scheme)
        if held.input_scale is not None:
            layer.input_scale, layer.input_zero_point = held.input_scale, held.input_zero_point
        exact, actual = x @ matrix.T, layer(x)
    norm = float(exact.norm())
    return float((actual - exact).norm()) / norm if norm else 0.0


def require_agreement(original: Lane, smoothed: Lane, checkpoint: Checkpoint) -> None:
    """Raise StructureError unless some tokens came through the original and the smoothed weights alike."""
    a, b = (lane.waiting.args[0].float() for lane in (original, smoothed))
    difference = float((a - b).norm() / a.norm())
    rounded = {info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point}
    # Gains are compensated exactly; what is left is the rounding of biases, and of what is computed in.
    rounded.add(original.waiting.args[0].dtype)
    limit = 4 * max(torch.finfo(dtype).eps for dtype in rounded) + 1e-3
    if not difference <= limit:
        raise StructureError(
            f"the smoothed model's output differs from the original's by {difference:.2g} (at most {limit:.2g} is "
            "rounding): nothing was finished; quantize with --smooth off, and please report the architecture"
        )


def _weights(block: nn.Module, findings: Findings) -> list[Weight]:
    """All that multiplies in a block, as far as is known: what was seen to, and every `nn.Linear`."""
    linears = [Weight(_join(name, "weight")) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys([*(weight for group in findings.groups for weight in group.weights), *linears]))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
