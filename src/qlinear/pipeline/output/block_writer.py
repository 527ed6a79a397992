"""What a block becomes in the file: codes for what was chosen, what smoothing changed, and the rest as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

from torch import Tensor

from ...algorithms.parts.smoothing_search import Search
from ...checkpoint.layouts.base import QuantizedLinear
from ...formats.rounding import QuantizedTensor
from ...runtime.distributed import Ranks
from ...runtime.threads import on_each_core_or_here
from ...streaming.streamed_model import StreamedModel
from ...tracing.trace import Weight
from ..block_state import Findings, Layer, Migration, Recipe, joined
from ..quantize_groups import Rounded, relative, round_weights
from ..select_layers import file_names
from .keep_worst import KeepWorst, Unit
from .sink import Done, Sink

_ALONE = Ranks()


class BlockWriter:
    """Rounds and writes one block after another; `layers` and `warnings` tell what became of them."""

    def __init__(
        self, source: StreamedModel, writer: Sink, recipe: Recipe, done: Done, ranks: Ranks = _ALONE
    ) -> None:
        self.source, self.writer, self.recipe, self.ranks = source, writer, recipe, ranks
        self.layers, self.warnings = list(done.layers), list(done.warnings)
        self.kept: list[str] = []
        self._reserve = KeepWorst(recipe.keep_worst)
        self._over: Callable[..., Iterator[list[Rounded]]] = map

    @contextmanager
    def on_each_core(self) -> Iterator[None]:
        """Inside, linears are rounded one on each core, rather than each by all, while finished ones are written."""
        with on_each_core_or_here(self.source.device) as cores:
            self._over = cores.map
            try:
                yield
            finally:
                self._over = map

    def round(self, found: Findings) -> Iterator[list[Rounded]]:
        """Codes for what was chosen of a block, one unit after another; its weights in the block are smoothed then."""
        units = [*self._single(found), *chain.from_iterable(self._experts(found).values())]
        rounded = self.ranks.split(
            units, lambda unit: list(round_weights(found, unit, self.recipe)), self._over
        )
        for unit, made in zip(units, rounded, strict=True):
            for weight in unit:
                self._smooth_in_place(found, weight)
            yield made

    def write(self, found: Findings, units: Iterable[list[Rounded]]) -> list[Rounded]:
        """Write a block, and what `round` made of it; that is returned, experts as the stacks that they are."""
        changed, written, made_of = {*found.smoothing.changed, *found.refined}, [], iter(units)
        for members in self._single(found):
            made = next(made_of)
            quantized = {each.weight for each in made}
            changed.update(self._write_floats(found, [w for w in members if w not in quantized]))
            self._emit(self._unit(found, made))
            written += made
        experts = self._experts(found)
        for name, groups in experts.items():
            made = [each for _ in groups for each in next(made_of)]
            in_order = sorted(made, key=lambda each: each.weight.index or 0)
            written.append(self._write_stack(found, name, in_order))
        plain = changed.difference(experts)
        together = {n for name in plain for n in self.source.names.made_with(joined(found.name, name))}
        refined = {joined(found.name, name): vector for name, vector in found.refined.items()}
        self._write_float(
            {name: refined.get(name, self.source.model.get_parameter(name)) for name in together}
        )
        return written

    def _single(self, found: Findings) -> list[list[Weight]]:
        """The weights of a block that are in no stack that was chosen, by what an engine may merge."""
        stacks = self._stacks(found)
        return found.merge_groups([weight for weight in found.weights() if weight.name not in stacks])

    def _experts(self, found: Findings) -> dict[str, list[list[Weight]]]:
        """All matrices of each stack (experts, out, in) that was chosen, whether tokens reached them or not."""
        seen = {(weight.name, weight.index): weight for weight in found.weights()}
        return {
            name: found.merge_groups(
                [
                    seen.get((name, i), Weight(name, False, i))
                    for i in range(len(found.block.get_parameter(name)))
                ]
            )
            for name in self._stacks(found)
        }

    def _write_floats(self, found: Findings, weights: Sequence[Weight]) -> Iterator[str]:
        """Write those that stay in float and can hold a vector; the names of the others that smoothing changed."""
        for weight in weights:
            if found.full_name(weight) in self.recipe.holders:
                self._write_holder(found, weight)
            elif found.smoothing.touches(weight):
                yield weight.name

    def _smooth_in_place(self, found: Findings, weight: Weight) -> None:
        """Leave the smoothed weight in the block: for what stays float, and for the tokens that check the folds."""
        if found.smoothing.touches(weight):
            found.smoothing.apply_in_place(weight, weight.of(found.block).detach())

    def _unit(self, found: Findings, made: Sequence[Rounded]) -> Unit:
        """What is written of some weights, and what would be if they stayed in float."""
        tensors: dict[str, Tensor] = {}
        layers = []
        for each in made:
            name = found.full_name(each.weight)
            module = self.source.names.source_module(name)
            tensors |= self.recipe.layout.pack(module, each.held)
            scheme = each.held.scheme.name
            layers.append(self._layer(name, scheme, each.error, each.rtn_error, each.weight, found))
            if each.note:
                self.warnings.append(f"{name}: {each.note}")
        floats = {}
        if self.recipe.keep_worst:
            names = {joined(found.name, each.weight.name): each.weight.name for each in made}
            floats = {
                full: self._stored(full, found.block.get_parameter(name)).clone()
                for full, name in names.items()
            }
        return Unit(tuple(layers), tensors, floats)

    def _emit(self, unit: Unit) -> None:
        for each in self._reserve.offer(unit):
            self._write_quantized(each)

    def _write_quantized(self, unit: Unit) -> None:
        for key, tensor in unit.tensors.items():
            self.writer.add(key, tensor)
        self.layers += unit.layers

    def _write_stack(self, found: Findings, name: str, made: Sequence[Rounded]) -> Rounded:
        """Experts (experts, out, in) that the file holds one by one: each becomes a quantized linear there."""
        full = joined(found.name, name)
        held = replace(made[0].held, weight=QuantizedTensor.stack([each.held.weight for each in made]))
        self._write_experts(full, held)
        error, rtn_error = (
            sum(values) / len(made) for values in ([e.error for e in made], [e.rtn_error for e in made])
        )
        self.layers.append(self._layer(full, held.scheme.name, error, rtn_error, made[0].weight, found))
        return Rounded(Weight(name), held, error, rtn_error)

    def _write_experts(self, name: str, held: QuantizedLinear) -> None:
        """Each expert of a stack under the file's name for it."""
        to_sources, weight = self.source.names.to_sources, held.weight
        codes, scales = to_sources({name: weight.codes}), to_sources({name: weight.scale})
        zeros = {} if weight.zero_point is None else to_sources({name: weight.zero_point})
        for key, code in codes.items():
            one = QuantizedTensor(code.contiguous(), scales[key].contiguous(), zeros.get(key), weight.format)
            expert = replace(held, weight=one)
            for full, tensor in self.recipe.layout.pack(key.removesuffix(".weight"), expert).items():
                self.writer.add(full, tensor)

    def _layer(
        self,
        name: str,
        scheme: str | None,
        error: float,
        rtn_error: float,
        weight: Weight,
        found: Findings,
    ) -> Layer:
        smoothing, leader = found.smoothing, found.leader(weight)
        taken, search = smoothing.folded_into.get(weight), found.searches.get(weight)
        where: Migration = "kept" if weight in smoothing.migration else "folded" if taken else "none"
        alpha = search.point.alpha if search and where != "none" else None
        if search is None and where != "none" and not isinstance(self.recipe.smooth, str):
            alpha = self.recipe.smooth
        return Layer(
            name, scheme, error, rtn_error, 0.0, where, taken and joined(found.name, taken),
            joined(found.name, leader.module) if leader else None, alpha, _curve(search),
        )  # fmt: skip

    def _write_holder(self, found: Findings, weight: Weight) -> None:
        """Write a weight that stays in float, smoothed, and the vector that it keeps beside it, if any."""
        name, exact = found.full_name(weight), weight.of(found.block).detach().float()
        if (vector := found.smoothing.migration.get(weight)) is not None:
            exact = exact * vector
        stored = self._stored(f"{name}.weight", exact)
        if found.smoothing.touches(weight):
            self._write_float({f"{name}.weight": stored})
        if vector is not None:
            self.writer.add(f"{self.source.names.source_module(name)}.migration_scale", vector)
        error = relative(stored.float(), exact)
        self.layers.append(self._layer(name, None, error, error, weight, found))

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.source.stored_dtype(name))

    def _write_float(self, changed: Mapping[str, Tensor]) -> None:
        """Write parameters in the dtype that the source holds them in, under the source's names."""
        stored = {name: self._stored(name, tensor) for name, tensor in sorted(changed.items())}
        for name, tensor in self.source.names.to_sources(stored).items():
            self.writer.add(name, tensor)

    def smooth_again(self, found: Findings) -> None:
        """Smooth the weights of a block as the run that finished it did."""
        for weight in dict.fromkeys([*found.smoothing.columns, *found.smoothing.rows]):
            self._smooth_in_place(found, weight)

    def read_back(self, found: Findings) -> dict[str, QuantizedLinear]:
        """What the file holds of a finished block, by the names of its modules there."""
        names = {
            module: name
            for name in (*self._stacks_in_full(found), *(found.full_name(w) for w in self._linears(found)))
            for module in file_names(self.source, name)
        }
        return {module: self._unpack(module, name) for module, name in names.items()}

    def put_back(self, found: Findings, held: Mapping[str, QuantizedLinear]) -> list[Rounded]:
        """A finished block's linears as `write` gave them; experts become what their codes stand for."""
        for name in self._stacks_in_full(found):
            for key, part in self.source.names.parts_of(name, self.source.model.get_parameter(name)):
                part.detach().copy_(held[key.removesuffix(".weight")].weight.dequantize())
        module_of = self.source.names.source_module
        return [
            Rounded(weight, held[module_of(found.full_name(weight))], 0.0, 0.0)
            for weight in self._linears(found)
        ]

    def _linears(self, found: Findings) -> list[Weight]:
        """The linears of a block that were chosen."""
        return [w for w in found.weights() if w.index is None and found.full_name(w) in self.recipe.schemes]

    def _stacks_in_full(self, found: Findings) -> list[str]:
        return [joined(found.name, name) for name in self._stacks(found)]

    def _stacks(self, found: Findings) -> list[str]:
        """The parameters of a block that are stacks of experts and were chosen."""
        names = [name for name, _ in found.block.named_parameters()]
        return [name for name in names if joined(found.name, name) in self.recipe.schemes]

    def _unpack(self, module: str, name: str) -> QuantizedLinear:
        tensors = {key: self.writer.read(key) for key in self.writer.names if key.startswith(f"{module}.")}
        return self.recipe.layout.unpack(module, tensors, self.recipe.schemes[name])

    def finish(self) -> None:
        """Decide what was held back, copy what nothing touched, and close the file."""
        kept, let_go = self._reserve.decide()
        for unit in let_go:
            self._write_quantized(unit)
        for unit in kept:
            self.kept += [layer.name for layer in unit.layers]
            self._write_float(unit.floats)
        if self.kept:
            self.warnings.append(f"left in float, as the most sensitive: {', '.join(self.kept)}")
        self.layers = _with_shares(self.layers)
        replaced = {f"{name}.weight" for layer in self.layers for name in file_names(self.source, layer.name)}
        for name in self.source.checkpoint.tensors:
            if name not in self.writer.names and name not in replaced:
                self.writer.copy(name, self.source.checkpoint)
        self.writer.finish()


def _curve(search: Search | None) -> tuple[tuple[str, float, float], ...]:
    return tuple((p.form, p.alpha, error) for p, error in search.curve) if search else ()


def _with_shares(layers: Sequence[Layer]) -> list[Layer]:
    """Each layer with its share of the squared relative errors of all."""
    total = sum(layer.error**2 for layer in layers) or 1.0
    return [replace(layer, share=layer.error**2 / total) for layer in layers]
