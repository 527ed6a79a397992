"""The main job: a checkpoint in, a quantized checkpoint out, one decoder block in memory at a time.

    for each block, as the calibration set stands before it:
        load it  ·  find and prove its folds  ·  pass the set through it, gathering statistics
        smooth   ·  round                     ·  write what came out, and forget it

A block that an interrupted run has finished is not worked on again: the set passes through it as it did then.
"""

from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.collect import calibrate
from ..calibration.stats import InputStats
from ..calibration.stats_file import CalibrationStats
from ..checkpoint.reader import Checkpoint
from ..errors import StructureError
from ..runtime.distributed import Ranks
from ..streaming.find_blocks import shared_parameters
from ..streaming.lanes import Lane, batches_of
from ..streaming.spill import Spill
from ..streaming.streamed_model import StreamedModel
from ..tracing.experiment import Trace
from ..tracing.folds import Fold, find_groups
from ..tracing.proof import find_and_prove_folds, reversible, run_in_float32
from ..tracing.trace import Weight
from .block_state import Findings, Layer, Progress, Recipe, joined, unseen
from .check_weights import finding_bad_weights
from .output.block_writer import BlockWriter
from .output.sink import Record, Sink
from .propagate import running_quantized
from .quantize_groups import Rounded
from .refine_block import hidden_state, refine
from .rounded_inputs import rounded_inputs
from .smooth_block import smooth_block

# Tokens for experiments: many sequences of one token to find folds, a few real ones to prove them.
_PROBE, _PROOF = 64, (2, 16)
# Tokens that pass through a block at once: enough to fill a matrix product, few enough to stay small.
_BATCH_TOKENS = 1024
_ALONE = Ranks()


class Standing(NamedTuple):
    """What stands before a block: experiments, the calibration set as quantized blocks leave it, and, where a block is
    refined, the same set as the original ones do."""

    probe: Lane
    proof: Lane
    smoothed: Lane
    calibration: Sequence[Lane]
    originals: Sequence[Lane]


class Job:
    """Quantizes the linears of a model's blocks; `run` is the loop.

    recipe: what is done to each of them. tokens: the calibration set (n, seq_len), None where nothing needs it.
    statistics: of an earlier calibration, which then stand for what this set would give. writer, journal: where
    results go, and what remembers them. ranks: the processes that share the work. spill: where hidden states wait
    while memory is short.
    """

    def __init__(
        self,
        source: StreamedModel,
        writer: Sink,
        journal: Record,
        recipe: Recipe,
        tokens: Tensor | None,
        progress: Progress,
        statistics: CalibrationStats | None = None,
        ranks: Ranks = _ALONE,
        spill: Spill | None = None,
    ) -> None:
        self.statistics, self.ranks, self.spill = statistics, ranks, spill
        self.source, self.recipe, self.tokens, self.progress = source, recipe, tokens, progress
        self.journal = journal
        self.blocks = BlockWriter(source, writer, recipe, journal.done, ranks)
        self._previous_folds: Sequence[Fold] = ()
        self._held_back: set[str] = set()
        self._shared = shared_parameters(source.blocks.values())

    @property
    def kept(self) -> list[str]:
        """Linears that were left in float, as the most sensitive."""
        return self.blocks.kept

    @property
    def layers(self) -> list[Layer]:
        """What became of every linear so far."""
        return self.blocks.layers

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        return self.blocks.warnings

    def run(self) -> None:
        """Every block, then what belongs to none."""
        for _ in self.steps():
            pass
        self.journal.flush()
        self.blocks.finish()
        self.progress("quantizing", len(self.source.blocks), len(self.source.blocks))

    def steps(self) -> Generator[str]:
        """Every block that is not finished yet, in the model's order: its name, when it is. The output head comes last,
        if it is quantized."""
        if self.tokens is not None:
            yield from self._calibrated_steps(self.tokens)
        else:
            yield from self._plain_steps()

    def _plain_steps(self) -> Iterator[str]:
        """Where nothing passes through the blocks: the next one is read while one is rounded and the last written."""
        with self.blocks.on_each_core(), self.source.prefetching():
            for name, block in self.source.blocks.items():
                if name not in self.journal.done.blocks:
                    with self._loaded(block, self.recipe.schemes):
                        self._write(self._findings(block))
                    yield name
        self._quantize_head()

    def _calibrated_steps(self, tokens: Tensor) -> Iterator[str]:
        with torch.no_grad(), self.source.lanes(self._batches(tokens), self.spill) as lanes:
            at = self._standing(*lanes)
            while (block := lanes.at) is not None and block is not self.source.head:
                with self._loaded(block):
                    if self.source.name_of(block) in self.journal.done.blocks:
                        self._replayed(block, at)
                    else:
                        self._calibrated(block, at)
                yield self.source.name_of(block)
                if self._is_last(at):
                    break
            require_agreement(at.proof, at.smoothed, self.source.checkpoint)
            self._quantize_head(at)

    def _quantize_head(self, at: Standing | None = None) -> None:
        """Round and write the output head, if the recipe says so, by what reaches it."""
        head = self.source.head
        if self.source.head_name in self.recipe.schemes:
            with self._loaded(head):
                found = self._findings(head)
                # Statistics of an earlier calibration need not know of it, unless its scale is fixed.
                is_static = self.recipe.schemes[self.source.head_name].is_static
                if at is not None and (self.statistics is None or is_static):
                    trace = run_in_float32(head, at.proof.waiting)
                    found.stats = self._statistics_of(found, trace, at, advance=False)
                    self._see_rounded(found, at)
                self.blocks.write(found, self.blocks.round(found))

    def _standing(self, probe: Lane, proof: Lane, smoothed: Lane, *rest: Lane) -> Standing:
        half = len(rest) // 2 if self.recipe.refine else len(rest)
        return Standing(probe, proof, smoothed, rest[:half], rest[half:])

    @contextmanager
    def _loaded(self, block: nn.Module, rounded: Container[str] = ()) -> Iterator[None]:
        """Inside, a block is in memory; nothing but rounding meets the weights of `rounded` linears."""
        if block is not self.source.head:
            self.progress("quantizing", self.source.position(block), len(self.source.blocks))
        with self.source.loaded(block), finding_bad_weights(self.source, block, rounded):
            yield

    def _batches(self, tokens: Tensor) -> list[dict[str, Any]]:
        """Of this rank: the experiments, which all make, and its part of the calibration set."""
        calibration = [] if self.statistics else calibration_batches(tokens)
        mine = self.ranks.shard(calibration)
        return [*experiments(tokens), *mine, *(mine if self.recipe.refine else ())]

    def _findings(self, block: nn.Module) -> Findings:
        name = self.source.name_of(block)
        return Findings(name, block, lambda key: self.source.stored_dtype(joined(name, key)))

    def _calibrated(self, block: nn.Module, at: Standing) -> None:
        trace, self._previous_folds = find_and_prove_folds(
            block, at.probe.waiting, at.proof.waiting, self._previous_folds, self._shared[block]
        )
        at.probe.step()
        found = self._findings(block)
        advance = not self.recipe.propagate and not self._is_last(at)
        found.stats = self._statistics_of(found, trace, at, advance)
        folds = [] if self.recipe.migration_scale == "always" else self._previous_folds
        if self.recipe.may_flip_signs and folds:
            found.reversible = reversible(block, at.proof.waiting, folds, trace)
        at.proof.step()
        found.groups = find_groups(trace, folds)
        for unsmoothed in smooth_block(found, self.recipe):
            names = ", ".join(joined(found.name, weight.module) for weight in unsmoothed)
            self.warnings.append(f"{names}: nothing can take the smoothing, left unsmoothed")
        self.warnings.extend(unseen(found, trace, self.recipe))
        self._see_rounded(found, at)
        rounded = self._write(found, at)
        at.smoothed.step()
        if self.recipe.propagate and not self._is_last(at):
            self._pass_on(found, rounded, at.calibration)

    def _is_last(self, at: Standing) -> bool:
        """Whether nothing is quantized after the block that the experiments have passed."""
        after = at.probe.call
        has_head = self.source.head_name in self.recipe.schemes
        return after is None or (after.module is self.source.head and not has_head)

    def _statistics_of(
        self, found: Findings, trace: Trace, at: Standing, advance: bool
    ) -> dict[Weight, InputStats]:
        """What a block's weights read; see `calibrate`."""
        if self.statistics is not None:
            return self.statistics.of_block(found.name, trace)
        return calibrate(
            found.block, at.calibration, trace, found.name, advance=advance, ranks=self.ranks,
            needs_hessian_of=lambda weight: self.recipe.needs_hessian(found, weight),
        )  # fmt: skip

    def _see_rounded(self, found: Findings, at: Standing) -> None:
        """What rounding makes of a block's inputs; statistics of an earlier calibration do not tell."""
        if self.statistics is None:
            found.rounded_inputs = rounded_inputs(found, at.calibration, self.recipe, self.ranks)

    def _write(self, found: Findings, at: Standing | None = None) -> list[Rounded]:
        """Round and write a block, and note that it is done."""
        if found.name in self._held_back:
            raise StructureError(
                f"the model passes {found.name} twice, and what keep_worst holds back cannot be passed again: use "
                "--keep-worst 0, or leave linears in float with --ignore"
            )
        units: Iterable[list[Rounded]] = self.blocks.round(found)
        if at is not None and self.recipe.refine:
            units = self._refined(found, list(units), at)
        rounded = self.blocks.write(found, units)
        if self.recipe.keep_worst:  # what is held back until the end is in no file yet
            self._held_back.add(found.name)
        else:
            self.journal.record(found, self.layers, self.warnings, self.blocks.writer)
        return rounded

    def _refined(
        self, found: Findings, units: Sequence[list[Rounded]], at: Standing
    ) -> Sequence[list[Rounded]]:
        """What was made of a block, its scales and gains tuned by what the original block gives."""
        targets = []
        for lane in at.originals:
            output = lane.waiting.run()
            # A copy: what the lane goes on with may have to wait on the disk.
            targets.append(hidden_state(output).float().clone())
            lane.advance(output)
        rounded, shared = list(chain.from_iterable(units)), self._shared[found.block]
        refined = self.ranks.on_main(
            lambda: refine(found, rounded, at.calibration, targets, self.recipe.refine, shared)
        )
        if refined is None:
            self.warnings.append(f"{found.name}: no gradient comes back through it, so it was not refined")
            return units
        found.refined = refined.vectors
        of = {each.weight: each for each in refined.rounded}
        return [[of[each.weight] for each in unit] for unit in units]

    def _replayed(self, block: nn.Module, at: Standing) -> None:
        """Pass a block that was finished before, as the run that finished it did."""
        found = self._findings(block)
        if found.name == self.journal.done.blocks[-1]:
            _, self._previous_folds = find_and_prove_folds(
                block, at.probe.waiting, at.proof.waiting, (), self._shared[block]
            )
        at.probe.step()
        passes_now = not self.recipe.propagate and not self._is_last(at)
        for lane in (at.proof, *(at.calibration if passes_now else ())):
            lane.step()
        left = self.ranks.on_main(lambda: self.journal.record_of(found.name))
        found.smoothing, found.refined = left.smoothing, left.refined
        for key, tensor in left.changed.items():
            block.get_parameter(key).detach().copy_(tensor)
        self.blocks.smooth_again(found)
        for lane in (at.smoothed, *at.originals):
            lane.step()
        if self.recipe.propagate and not self._is_last(at):
            held = self.ranks.on_main(lambda: self.blocks.read_back(found))
            self._pass_on(found, self.blocks.put_back(found, held), at.calibration)

    def _pass_on(self, found: Findings, rounded: Sequence[Rounded], calibration: Sequence[Lane]) -> None:
        """Let the calibration set pass through the block as it has become."""
        with running_quantized(found, rounded):
            for lane in calibration:
                lane.step()


def experiments(tokens: Tensor) -> list[dict[str, Any]]:
    """The first model calls of a job: one to experiment on, and two alike to prove with."""
    probe, proof = tokens.flatten()[:_PROBE].unsqueeze(1), tokens[: _PROOF[0], : _PROOF[1]]
    return [*batches_of(probe, _PROBE), *batches_of(proof, len(proof)) * 2]


def calibration_batches(tokens: Tensor) -> list[dict[str, Any]]:
    """The calibration set (n, seq_len) as model calls."""
    return batches_of(tokens, rows_at_once(tokens))


def rows_at_once(tokens: Tensor) -> int:
    """How many sequences of a calibration set (n, seq_len) make one model call."""
    return max(1, _BATCH_TOKENS // tokens.shape[1])


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
