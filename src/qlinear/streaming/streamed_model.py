"""A checkpoint, quantized or not, as a model whose blocks are in memory only while they are used.

The model is built on meta (`meta_model`), its parameters are matched with the tensors of the file (`weight_map`), and
its blocks are found (`find_blocks`). `lanes` runs micro-batches up to the first block; `loaded` holds one block's
weights in memory. The linears of a quantized checkpoint are replaced by `QLinear`s while their block is loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.dequantized_view import DequantizedView
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..formats.scheme import Scheme
from ..nn import QLinear, SmoothedLinear
from ..runtime.device import CPU, has_native_products, within_memory
from .diagnose import diagnosing
from .find_blocks import find_blocks
from .float32 import tensors_of
from .lanes import Lanes
from .meta_model import build_meta_model
from .plain_linear import is_plain_linear
from .prefetch import Prefetch
from .spill import Spill
from .weight_map import WeightMap


class StreamedModel:
    """The causal language model of a checkpoint, with all parameters on meta until they are loaded.

    checkpoint: the source of its weights. dtype: what it computes in; None for the file's own dtype, or float32 on
    processors that only emulate that one, where float32 is several times faster. name: shown to the user, by default
    the folder's name. device: where it computes.

    model: the transformers model. names: its parameters in the file. blocks: its blocks by name, vision towers'
    included. head, head_name: the output head. schemes: of the quantized linears, by the model's names.
    Raises CheckpointError if the model cannot be built or lacks tensors.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        name: str | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint, self.trust_remote_code, self.device = checkpoint, trust_remote_code, device
        self.name = name or checkpoint.path.name
        self.model = build_meta_model(checkpoint.path, dtype, trust_remote_code=trust_remote_code)
        self.dtype = dtype or compute_dtype(self.model.dtype, device)
        if self.dtype != self.model.dtype:
            self.model = build_meta_model(checkpoint.path, self.dtype, trust_remote_code=trust_remote_code)
        self._view = DequantizedView.of(checkpoint)
        replace_transposed(self.model, self._view.schemes)
        self.names = WeightMap(self.model, self._view, device)
        self._prefetch = None if device == CPU else Prefetch(self.names)
        self._attach_migration_scales()
        _move_buffers(self.model, device)
        self.blocks = find_blocks(self.model)
        self.head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head_name: str = next(name for name, m in self.model.named_modules() if m is self.head)
        self.schemes = self._find_schemes()
        self._name_of: dict[int, str] = {id(block): name for name, block in self.blocks.items()} | {
            id(self.head): self.head_name
        }

    def name_of(self, block: nn.Module) -> str:
        """The name in the model of a block or of the head."""
        return self._name_of[id(block)]

    def position(self, block: nn.Module) -> int:
        """The index of a block in the module tree."""
        return list(self.blocks).index(self.name_of(block))

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file stores a parameter of the model."""
        return self.checkpoint.info(self.names.sources(name)[0]).dtype

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a linear, or of a stack of experts by its parameter's name; None for float."""
        if name in self.schemes:
            return self.schemes[name]
        sources = self.names.sources(name) if name in self.names.names_in("") else []
        return self._view.schemes.get(sources[0].removesuffix(".weight")) if sources else None

    @property
    def block_nbytes(self) -> int:
        """Bytes of the largest block's parameters in the compute dtype."""
        sizes = [sum(p.numel() for p in block.parameters()) for block in self.blocks.values()]
        return max(sizes) * self.dtype.itemsize

    @contextmanager
    def lanes(self, batches: Sequence[Mapping[str, Any]], spill: Spill | None = None) -> Iterator[Lanes]:
        """Context manager: a lane per batch, paused before the first block. spill: as for `Lanes`.

        Parameters outside of the blocks stay in memory, except embedding tables: every lane has read them by then, and
        they can be as large as several blocks. Raises StructureError where the model cannot be run.
        """
        stops = [*self.blocks.values(), self.head]
        with (
            diagnosing(self._twin),
            within_memory(self.device),
            self._outside_loaded(),
            Lanes(self.model, stops, [_on(self.device, batch) for batch in batches], spill) as lanes,
            self._embeddings_released(),
        ):
            yield lanes

    @contextmanager
    def _outside_loaded(self) -> Iterator[None]:
        """Context manager: parameters outside of the blocks are in memory."""
        outside = self._outside()
        for part in outside:
            self.names.materialize(part)
        try:
            yield
        finally:
            if self._prefetch is not None:
                self._prefetch.drop()
            for part in outside:
                self.names.release(part)

    def _twin(self) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """A second model of this checkpoint, with all parameters on meta, and its blocks."""
        twin = StreamedModel(self.checkpoint, self.dtype, self.trust_remote_code)
        return twin.model, twin.blocks

    @contextmanager
    def _embeddings_released(self) -> Iterator[None]:
        """Context manager: embedding tables are not in memory; a table that is called is read again."""

        def read_again(name: str) -> Callable[..., None]:
            return lambda *_: self.names.materialize(name)

        inside = tuple(f"{name}." for name in self.blocks)
        tables = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        hooks = []
        for name, table in tables.items():
            if not name.startswith(inside):
                self.names.release(name, reuse=False)
                hooks.append(table.register_forward_pre_hook(read_again(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def loaded(self, block: nn.Module) -> Iterator[nn.Module]:
        """Context manager: the weights of a block (or the head) are in memory, and the next block's are read ahead.

        Yields the module with the weights: the block itself, or the `QLinear` that replaces a quantized head.
        """
        name = self.name_of(block)
        with within_memory(self.device):
            self._materialize(name)
            if block is not self.head:
                self.expect(block)
            try:
                yield self.model.get_submodule(name)
            finally:
                if self._prefetch is not None:
                    self._prefetch.flush()
                self.names.release(name)
                for linear in self._quantized_in(name):
                    self.model.set_submodule(linear, _placeholder(self.model.get_submodule(linear)))

    @contextmanager
    def prefetching(self) -> Iterator[None]:
        """Context manager: the next block is read into our memory while one computes, not into the page cache."""
        before, self._prefetch = self._prefetch, self._prefetch or Prefetch(self.names)
        try:
            yield
        finally:
            self._prefetch.drop()
            self._prefetch = before

    def expect(self, block: nn.Module) -> None:
        """Read the block after this one ahead: to the accelerator, or into the system's page cache."""
        for following in list(self.blocks)[self.position(block) + 1 :][:1]:
            if self._prefetch is not None and not self._quantized_in(following):
                self._prefetch.begin(following)
                continue
            sources = (self.names.sources(name) for name in self.names.names_in(following))
            self._view.expect(dict.fromkeys(chain.from_iterable(sources)))

    def load(self) -> nn.Module:
        """Load the whole model into memory, to stay there."""
        self._materialize("")
        return self.model

    def _materialize(self, part: str) -> None:
        quantized = self._quantized_in(part)
        if not quantized:
            ahead = {} if self._prefetch is None else self._prefetch.take(part)
            self.names.assign(part, ahead | self.names.load(part, ahead))
            return
        covered = tuple(f"{name}." for name in quantized)
        for name in self.names.names_in(part):
            if not name.startswith(covered):
                self.names.materialize(name)
        for name in quantized:
            self.model.set_submodule(name, self._quantized_linear(name))

    def _quantized_in(self, part: str) -> list[str]:
        return [name for name in self.schemes if not part or f"{name}.".startswith(f"{part}.")]

    def _quantized_linear(self, name: str) -> QLinear:
        module = self.names.source_module(name)
        quantized = self._view.linear(module)
        bias = self._bias(name)
        layer = QLinear.from_quantized(
            quantized.weight,
            None if bias is None else bias.to(self.dtype),
            quantized.scheme,
            migration_scale=quantized.migration_scale,
            dtype=self.dtype,
        )
        if quantized.input_scale is not None:
            layer.input_scale = quantized.input_scale
        if quantized.input_zero_point is not None and quantized.scheme.activation is not None:
            layer.input_zero_point = quantized.input_zero_point.to(quantized.scheme.activation.storage)
        return layer.to(self.device)

    def _bias(self, name: str) -> Tensor | None:
        """The bias of a linear in the file's dtype; None where the model has none, whatever the file holds."""
        if self.model.get_submodule(name)._parameters["bias"] is None:
            return None
        return self.checkpoint.read(self.names.sources(f"{name}.bias")[0])

    def _attach_migration_scales(self) -> None:
        """Replace the float linears that have a migration scale by `SmoothedLinear`s, which apply it."""
        smoothed: dict[str, SmoothedLinear] = {}
        # A linear that stands in several places is replaced in all of them.
        modules = list(self.model.named_modules(remove_duplicate=False)) if self._view.holders else []
        for name, module in modules:
            if not isinstance(module, nn.Linear) or not self.names.is_one_tensor(name):
                continue
            stored = self.names.source_module(name)
            if stored in self._view.holders:
                if stored not in smoothed:
                    vector = self.checkpoint.read(f"{stored}.migration_scale")
                    smoothed[stored] = SmoothedLinear.from_float(module, vector)
                self.model.set_submodule(name, smoothed[stored])
        if unknown := sorted(self._view.holders - smoothed.keys()):
            raise CheckpointError(
                f"{self.checkpoint.path} says in config.json that {unknown[0]} holds a migration scale, but the model "
                "has no such linear: give the config.json that was written with the weights"
            )

    def _find_schemes(self) -> dict[str, Scheme]:
        """The schemes of the quantized linears, by the model's names."""
        linears = [name for name, module in self.model.named_modules() if is_plain_linear(module)]
        modules = {
            name: self.names.source_module(name)
            for name in linears
            if self._view.schemes and self.names.is_one_tensor(name)
        }
        return {name: self._view.schemes[m] for name, m in modules.items() if m in self._view.schemes}

    def outside_tensors(self) -> list[Tensor]:
        """The parameters and buffers outside of the blocks and the output head that are in memory."""
        inside = {id(t) for part in (*self.blocks.values(), self.head) for t in tensors_of(part)}
        return [t for t in tensors_of(self.model) if id(t) not in inside and not t.is_meta]

    def _outside(self) -> list[str]:
        """Names of the parameters and buffers outside of the blocks and the output head."""
        inside = (*(f"{name}." for name in self.blocks), f"{self.head_name}.")
        return [name for name in self.names.names_in("") if not name.startswith(inside)]


def transposed_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears that store their weight as (in, out), by name: transformers' `Conv1D`, as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


def replace_transposed(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Replace transposed linears that the file holds quantized, which is as (out, in), by `nn.Linear`s."""
    for name, module in transposed_linears(model).items() if schemes else ():
        # The file may omit the name of the outermost module, as GPT-2's does.
        if any(name == stored or name.endswith(f".{stored}") for stored in schemes):
            width, out_features = module.get_parameter("weight").shape
            linear = nn.Linear(width, out_features, device="meta", dtype=module.get_parameter("weight").dtype)
            model.set_submodule(name, linear.requires_grad_(False))


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the stored one where the device multiplies in it natively, else float32."""
    return stored if has_native_products(stored, device) else torch.float32


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that a model computed when it was built to the device. Shared buffers stay shared."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model call with their tensors on the device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _placeholder(layer: nn.Module) -> nn.Linear:
    """A linear on meta, to replace a quantized one whose block is released."""
    assert isinstance(layer, QLinear)
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
