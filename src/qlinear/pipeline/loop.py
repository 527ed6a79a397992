"""The loop of the job: a checkpoint in, a quantized checkpoint out, one decoder block in memory at a time.

    for each block, when the calibration set stands before it:
        load       its weights, while the next block's are read ahead          StreamedModel.loaded
        trace      find its groups and prove their folds                       tracing.proof
        calibrate  pass the calibration set through it, gathering statistics   calibration.collect
        quantize   smooth, round, report                                       quantize_block
        refine     tune its scales, if asked for                               refine_block
        write      its codes, and note in the journal that it is finished      output.block_writer
        pass on    let the calibration set through the quantized block         propagate

A block that an interrupted run has finished is not worked on again: the set passes through it as it did then.
"""

from collections.abc import Container, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.collect import calibrate
from ..calibration.stats_file import CalibrationStats
from ..errors import StructureError
from ..runtime.distributed import Ranks
from ..runtime.threads import on_each_core_or_here
from ..streaming.find_blocks import shared_parameters
from ..streaming.float32 import advance_in_float32, in_float32, is_narrow, step_in_float32, tensors_of
from ..streaming.lanes import Lane
from ..streaming.spill import Spill
from ..streaming.streamed_model import StreamedModel
from ..tracing.experiment import Trace
from ..tracing.folds import Fold, find_groups
from ..tracing.proof import find_and_prove_folds, reversible, run_in_float32
from .block import Block, BlockResult, BlockStats, Layer, Progress, QuantizedWeight, joined
from .check_weights import finding_bad_weights
from .fold_check import FoldCheck, median_difference, rounding_limit
from .lane_sets import LaneSets, calibration_batches, tracing_batches
from .options import Options
from .output.block_writer import BlockWriter
from .output.sink import Record, Sink
from .propagate import running_quantized
from .quantize_block import Mapped, quantize_block
from .refine_block import hidden_state, refine_block
from .rounded_inputs import measure_rounded_inputs
from .smoothing import Smoothing

_ONE_RANK = Ranks()


class BlockLoop:
    """Quantizes the selected linears of a model, block by block; `run` is the loop.

    tokens: the calibration set (n, seq_len), None where nothing needs it. statistics: of an earlier calibration, used
    instead of this set's. sink, journal: where results go, and where finished blocks are noted. ranks: the processes
    that share the work. spill: where hidden states wait while memory is short.
    """

    def __init__(
        self,
        source: StreamedModel,
        sink: Sink,
        journal: Record,
        options: Options,
        tokens: Tensor | None,
        progress: Progress,
        statistics: CalibrationStats | None = None,
        ranks: Ranks = _ONE_RANK,
        spill: Spill | None = None,
    ) -> None:
        self.source, self.options, self.tokens, self.progress = source, options, tokens, progress
        self.statistics, self.ranks, self.spill, self.journal = statistics, ranks, spill, journal
        self.writer = BlockWriter(source, sink, options, journal.done)
        self._previous_folds: Sequence[Fold] = ()
        self._held_back: set[str] = set()
        self._shared = shared_parameters(source.blocks.values())

    @property
    def layers(self) -> list[Layer]:
        """The reports of all linears so far."""
        return self.writer.layers

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        return self.writer.warnings

    def run(self) -> None:
        """Every block, then the tensors that belong to none."""
        for _ in self.steps():
            pass
        self.journal.flush()
        self.writer.finish()
        self.progress("quantizing", len(self.source.blocks), len(self.source.blocks))

    def steps(self) -> Generator[str]:
        """Work on every unfinished block in the model's order, then on the head; yields each block's name when done."""
        if self.tokens is not None:
            yield from self._calibrated_steps(self.tokens)
        else:
            yield from self._plain_steps()

    def _plain_steps(self) -> Iterator[str]:
        """Blocks that no data passes through: one is read and one written while the linears of a third are rounded."""
        written: Future[None] | None = None
        with (
            ThreadPoolExecutor(1, "writer") as pen,
            on_each_core_or_here(self.source.device) as cores,
            self.source.prefetching(),
        ):
            for name, module in self.source.blocks.items():
                if name in self.journal.done.blocks:
                    continue
                with self._loaded(module, self.options.schemes):
                    block = self._block(module)
                    result = quantize_block(block, BlockStats(), self.options, self._mapped(cores.map))
                    if written is not None:
                        written.result()
                    written = pen.submit(self._write, block, result)
                yield name
            if written is not None:
                written.result()
        self._quantize_head()

    def _calibrated_steps(self, tokens: Tensor) -> Iterator[str]:
        calibration = self.ranks.shard([] if self.statistics else calibration_batches(tokens))
        originals = calibration if self.options.refine else ()
        batches = [*tracing_batches(tokens), *calibration, *originals]
        with torch.no_grad(), self.source.lanes(batches, self.spill) as all_lanes:
            lanes = LaneSets.of(list(all_lanes), self.options.refine > 0)
            while (module := all_lanes.at) is not None and module is not self.source.head:
                with self._loaded(module):
                    if self.source.name_of(module) in self.journal.done.blocks:
                        self._replay(module, lanes)
                    else:
                        self._work_on(module, lanes)
                yield self.source.name_of(module)
                if self._is_last(lanes):
                    break
            self._note_disagreement(lanes)
            self._quantize_head(lanes)

    def _note_disagreement(self, lanes: LaneSets) -> None:
        """Tell the user if the smoothed model's hidden state, before rounding, is not the original's at the end."""
        difference = median_difference(lanes.proof.waiting.hidden, lanes.smoothed.waiting.hidden)
        if not difference <= rounding_limit(self.source.checkpoint):
            self.warnings.append(
                f"the smoothed model's output differs from the original's by {difference:.2g} on the check tokens, "
                "though every fold holds in its block: compare with --smooth off, and please report the architecture"
            )

    def _work_on(self, module: nn.Module, lanes: LaneSets) -> None:
        """One block, from its trace to the lanes that stand before the next."""
        with in_float32(tensors_of(module)):
            block, trace = self._trace(module, lanes)
            check, output = FoldCheck.run(lanes.proof, trace)
            advance_in_float32(lanes.proof, output, self.source.outside_tensors())
        stats = self._stats(
            block, trace, lanes, advance=not self.options.propagate and not self._is_last(lanes)
        )
        result = self._checked(block, stats, check, lanes)
        result = self._refined(block, result, lanes)
        self._write(block, result)
        if self.options.propagate and not self._is_last(lanes):
            self._pass_on(module, result.quantized, result, lanes)

    def _trace(self, module: nn.Module, lanes: LaneSets) -> tuple[Block, Trace]:
        """The block with its groups and proved folds; the probe moves on."""
        probe, proof = lanes.probe.waiting, lanes.proof.waiting
        trace, folds = find_and_prove_folds(module, probe, proof, self._previous_folds, self._shared[module])
        self._previous_folds = folds
        used = [] if self.options.migration_scale == "always" else folds
        signs = reversible(module, proof, used, trace) if self.options.may_flip_signs and used else []
        unread = sorted(trace.unread - {product.weight.name for product in trace.products})
        groups = tuple(find_groups(trace, used))
        block = replace(self._block(module), groups=groups, reversible=tuple(signs), unread=tuple(unread))
        self._step_in_float32(lanes.probe, module)
        return block, trace

    def _checked(self, block: Block, stats: BlockStats, check: FoldCheck, lanes: LaneSets) -> BlockResult:
        """The result of a block, which is smoothed in memory then; the tokens that check the folds have passed it.

        A fold that changes the block's output is undone: its vector stays with the layers or is left out, and a note
        says so.
        """
        result = quantize_block(block, stats, self.options, self._mapped())
        if not self._smooth(block, result.smoothing, lanes, check):
            wrong = check.wrong_folds(block, result.smoothing)
            groups = tuple(replace(g, fold=None) if g.fold in wrong else g for g in block.groups)
            result = quantize_block(replace(block, groups=groups), stats, self.options, self._mapped())
            self._smooth(block, result.smoothing, lanes)
            names = ", ".join(joined(block.name, fold.producer.name) for fold in wrong)
            note = f"{names}: folding the smoothing there changes the block's output, so it is not folded"
            result = replace(result, notes=(*result.notes, note))
        return result

    def _smooth(
        self, block: Block, smoothing: Smoothing, lanes: LaneSets, check: FoldCheck | None = None
    ) -> bool:
        """Smooth the block in memory, and let the tokens that check the folds pass it, smoothed in float32.

        Returns whether the block's output agrees with `check`; where it does not, nothing changes.
        """
        check = check if smoothing.folded_into else None
        if is_narrow(block.module):
            with in_float32(tensors_of(block.module), private=True):
                smoothing.apply_to(block.module)
                if check is not None and not check.agrees(block):
                    return False
                self._step_in_float32(lanes.smoothed, block.module)
            smoothing.apply_to(block.module)
            return True
        if check is not None and not check.holds(block, smoothing):
            return False
        smoothing.apply_to(block.module)
        self._step_in_float32(lanes.smoothed, block.module)
        return True

    def _step_in_float32(self, lane: Lane, module: nn.Module) -> None:
        step_in_float32(lane, module, self.source.outside_tensors())

    def _stats(self, block: Block, trace: Trace, lanes: LaneSets, advance: bool) -> BlockStats:
        """The statistics of a block's inputs, and how to measure what rounding makes of them."""
        if self.statistics is not None:
            return BlockStats(self.statistics.of_block(block.name, trace), is_measured=True)
        inputs = calibrate(
            block.module, lanes.calibration, trace, block.name, advance=advance, ranks=self.ranks,
            needs_hessian_of=lambda weight: self.options.needs_hessian(block, weight),
        )  # fmt: skip
        stats = BlockStats(inputs, is_measured=True)
        return replace(
            stats,
            rounded_inputs=lambda smoothed: measure_rounded_inputs(
                block, stats, smoothed, lanes.calibration, self.options, self.ranks
            ),
        )

    def _quantize_head(self, lanes: LaneSets | None = None) -> None:
        """Quantize and write the output head if it is selected, with the statistics of its input."""
        head, name = self.source.head, self.source.head_name
        if name not in self.options.schemes:
            return
        with self._loaded(head):
            block, stats = self._block(head), BlockStats()
            # Statistics of an earlier calibration need not include the head, unless its input scale is fixed.
            if lanes is not None and (self.statistics is None or self.options.schemes[name].is_static):
                trace = run_in_float32(head, lanes.proof.waiting)
                stats = self._stats(block, trace, lanes, advance=False)
            self.writer.write(block, quantize_block(block, stats, self.options, self._mapped()))

    @contextmanager
    def _loaded(self, block: nn.Module, rounded: Container[str] = ()) -> Iterator[None]:
        """Context manager: a block is in memory. rounded: linears whose weights are only rounded."""
        if block is not self.source.head:
            self.progress("quantizing", self.source.position(block), len(self.source.blocks))
        with self.source.loaded(block), finding_bad_weights(self.source, block, rounded):
            yield

    def _block(self, module: nn.Module) -> Block:
        name = self.source.name_of(module)
        return Block(name, module, lambda key: self.source.stored_dtype(joined(name, key)))

    def _mapped(self, over: Mapped = map) -> Mapped:
        """How units are shared over the processes and, by `over`, within this one."""
        return lambda work, units: self.ranks.split(units, work, over)

    def _is_last(self, lanes: LaneSets) -> bool:
        """Whether nothing is quantized after the block that the probe has passed."""
        after = lanes.probe.call
        has_head = self.source.head_name in self.options.schemes
        return after is None or (after.module is self.source.head and not has_head)

    def _write(self, block: Block, result: BlockResult) -> None:
        """Write a block, and note in the journal that it is finished."""
        if block.name in self._held_back:
            raise StructureError(
                f"the model passes {block.name} twice, and what keep_worst holds back cannot be passed again: use "
                "--keep-worst 0, or leave linears in float with --ignore"
            )
        self.writer.write(block, result)
        if self.options.keep_worst:  # linears that are held back are in no file yet
            self._held_back.add(block.name)
        else:
            self.journal.record(result, self.layers, self.warnings, self.writer.sink)

    def _refined(self, block: Block, result: BlockResult, lanes: LaneSets) -> BlockResult:
        """The result with its scales and gains tuned towards the original block's output, if asked for."""
        if not self.options.refine:
            return result
        targets = [_step_and_copy(lane) for lane in lanes.originals]
        refined = self.ranks.on_main(
            lambda: refine_block(
                block, result, lanes.calibration, targets, self.options.refine, self._shared[block.module]
            )
        )
        if refined is None:
            note = f"{block.name}: no gradient comes back through it, so it was not refined"
            return replace(result, notes=(*result.notes, note))
        return refined

    def _replay(self, module: nn.Module, lanes: LaneSets) -> None:
        """Pass a block that was finished before, as the run that finished it did."""
        block = self._block(module)
        if block.name == self.journal.done.blocks[-1]:
            _, self._previous_folds = find_and_prove_folds(
                module, lanes.probe.waiting, lanes.proof.waiting, (), self._shared[module]
            )
        for lane in (lanes.probe, lanes.proof):
            self._step_in_float32(lane, module)
        if not self.options.propagate and not self._is_last(lanes):
            for lane in lanes.calibration:
                lane.step()
        record = self.ranks.on_main(lambda: self.journal.record_of(block.name))
        self._smooth(block, record.smoothing, lanes)
        for lane in lanes.originals:
            lane.step()
        if self.options.propagate and not self._is_last(lanes):
            linears = self.ranks.on_main(lambda: self.writer.read_linears(block))
            result = BlockResult(block.name, (), refined=record.refined)
            self._pass_on(module, self.writer.restore(block, linears), result, lanes)

    def _pass_on(
        self, module: nn.Module, quantized: Sequence[QuantizedWeight], result: BlockResult, lanes: LaneSets
    ) -> None:
        """Let the calibration set pass through the block as it has become."""
        with running_quantized(module, quantized, result.refined):
            for lane in lanes.calibration:
                lane.step()


def _step_and_copy(lane: Lane) -> Tensor:
    """Let a lane pass the block; returns a copy of its output, since the lane's own may have to wait on the disk."""
    output = lane.waiting.run()
    target = hidden_state(output).float().clone()
    lane.advance(output)
    return target
