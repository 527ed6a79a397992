"""Writes what became of each block: codes, changed float tensors, and at the end everything that nothing touched."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ...checkpoint.layouts.base import QuantizedLinear
from ...formats.rounding import QuantizedTensor
from ...streaming.streamed_model import StreamedModel
from ...tracing.trace import Weight
from ..block import Block, BlockResult, FloatHolder, Layer, QuantizedWeight, Unit, joined
from ..options import Options
from ..select_layers import file_names
from .keep_worst import KeepWorst, PackedUnit
from .sink import Done, Sink


class BlockWriter:
    """Writes block after block; `layers` and `warnings` are the reports of all blocks so far.

    kept: names of the linears that stayed in float, as the most sensitive; known after `finish`.
    """

    def __init__(self, source: StreamedModel, sink: Sink, options: Options, done: Done) -> None:
        self.source, self.sink, self.options = source, sink, options
        self.layers, self.warnings = list(done.layers), list(done.warnings)
        self.kept: list[str] = []
        self._keep_worst = KeepWorst(options.keep_worst)

    def write(self, block: Block, result: BlockResult) -> None:
        """Write a block. block: with the result's smoothing applied, for the float parameters that changed."""
        for unit in result.units:
            for holder in unit.holders:
                self._write_holder(holder)
            for packed in self._keep_worst.offer(self._packed(block, unit)):
                self._write_packed(packed)
        for unit in result.stacks:
            self._write_stack(block, unit)
        self._write_changed(block, result)
        self.warnings += result.notes

    def _write_changed(self, block: Block, result: BlockResult) -> None:
        """Write the float parameters that changed, with those that come from the same tensors of the file."""
        names = self.source.names
        together = {name for key in result.changed for name in names.made_with(joined(block.name, key))}
        vectors = {**result.smoothing.vectors, **result.refined}
        exact = {joined(block.name, name): vector for name, vector in vectors.items()}
        get = self.source.model.get_parameter
        self._write_float({name: exact[name] if name in exact else get(name) for name in together})

    def _packed(self, block: Block, unit: Unit) -> PackedUnit:
        """A unit's tensors in the file, and its float weights where it may have to stay in float."""
        tensors: dict[str, Tensor] = {}
        floats: dict[str, Tensor] = {}
        for quantized in unit.quantized:
            module = self.source.names.source_module(block.full_name(quantized.weight))
            tensors |= self.options.layout.pack(module, quantized.linear)
            if self.options.keep_worst:
                name = joined(block.name, quantized.weight.name)
                floats[name] = self._stored(name, block.module.get_parameter(quantized.weight.name)).clone()
        return PackedUnit(unit.layers, tensors, floats)

    def _write_packed(self, unit: PackedUnit) -> None:
        for key, tensor in unit.tensors.items():
            self.sink.add(key, tensor)
        self.layers += unit.layers

    def _write_stack(self, block: Block, unit: Unit) -> None:
        """Write each expert of a stack (experts, out, in) under the file's own name for it."""
        (quantized,) = unit.quantized
        name, weight = joined(block.name, quantized.weight.name), quantized.linear.weight
        to_sources = self.source.names.to_sources
        codes, scales = to_sources({name: weight.codes}), to_sources({name: weight.scale})
        zeros = {} if weight.zero_point is None else to_sources({name: weight.zero_point})
        divisors: dict[str, Tensor] = {}
        if (
            weight.global_scale is not None
        ):  # one per expert, repeated per row, because the file may split the rows
            by_row = to_sources({name: weight.global_scale.expand(*weight.scale.shape[:-1], 1).contiguous()})
            divisors = {key: rows.reshape(-1)[:1] for key, rows in by_row.items()}
        for key, code in codes.items():
            one = QuantizedTensor(
                code.contiguous(), scales[key].contiguous(), zeros.get(key), weight.format, divisors.get(key)
            )
            expert = replace(quantized.linear, weight=one)
            for full, tensor in self.options.layout.pack(key.removesuffix(".weight"), expert).items():
                self.sink.add(full, tensor)
        self.layers += unit.layers

    def _write_holder(self, holder: FloatHolder) -> None:
        """Write a float linear and the vector that it keeps."""
        if holder.matrix is not None:
            self._write_float({f"{holder.name}.weight": holder.matrix})
        if holder.vector is not None:
            self.sink.add(f"{self.source.names.source_module(holder.name)}.migration_scale", holder.vector)
        self.layers.append(holder.layer)

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.source.stored_dtype(name))

    def _write_float(self, parameters: Mapping[str, Tensor]) -> None:
        """Write parameters in the dtype and under the names of the source."""
        stored = {name: self._stored(name, tensor) for name, tensor in sorted(parameters.items())}
        for name, tensor in self.source.names.to_sources(stored).items():
            self.sink.add(name, tensor)

    def read_linears(self, block: Block) -> dict[str, QuantizedLinear]:
        """The quantized linears of a finished block from the file, by the names of their modules there."""
        selected = [*self._stacks(block), *(block.full_name(weight) for weight in self._linears(block))]
        names = {module: name for name in selected for module in file_names(self.source, name)}
        return {module: self._unpack(module, name) for module, name in names.items()}

    def restore(self, block: Block, linears: Mapping[str, QuantizedLinear]) -> list[QuantizedWeight]:
        """The quantized weights of a finished block; the values of experts are put into the block at once."""
        for name in self._stacks(block):
            for key, part in self.source.names.parts_of(name, self.source.model.get_parameter(name)):
                part.detach().copy_(linears[key.removesuffix(".weight")].weight.dequantize())
        module_of = self.source.names.source_module
        return [
            QuantizedWeight(weight, linears[module_of(block.full_name(weight))], 0.0, 0.0)
            for weight in self._linears(block)
        ]

    def _linears(self, block: Block) -> list[Weight]:
        return [w for w in block.weights() if w.index is None and block.full_name(w) in self.options.schemes]

    def _stacks(self, block: Block) -> list[str]:
        return [joined(block.name, name) for name in block.stacks(self.options.schemes)]

    def _unpack(self, module: str, name: str) -> QuantizedLinear:
        tensors = {key: self.sink.read(key) for key in self.sink.names if key.startswith(f"{module}.")}
        return self.options.layout.unpack(module, tensors, self.options.schemes[name])

    def finish(self) -> None:
        """Write what was held back, copy what nothing touched, and close the file."""
        kept, others = self._keep_worst.decide()
        for unit in others:
            self._write_packed(unit)
        for unit in kept:
            self.kept += [layer.name for layer in unit.layers]
            self._write_float(unit.floats)
        if self.kept:
            self.warnings.append(f"left in float, as the most sensitive: {', '.join(self.kept)}")
        self.layers = _with_shares(self.layers)
        replaced = {f"{name}.weight" for layer in self.layers for name in file_names(self.source, layer.name)}
        for name in self.source.checkpoint.tensors:
            if name not in self.sink.names and name not in replaced:
                self.sink.copy(name, self.source.checkpoint)
        self.sink.finish()


def _with_shares(layers: Sequence[Layer]) -> list[Layer]:
    """Each layer with its share of the squared relative errors of all."""
    total = sum(layer.error**2 for layer in layers) or 1.0
    return [replace(layer, share=layer.error**2 / total) for layer in layers]
