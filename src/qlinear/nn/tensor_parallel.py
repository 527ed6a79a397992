"""Quantized layers merged, sliced, and split over ranks.

A slice of a layer is a slice of its codes: rows of W are outputs, columns are inputs. Values per row (scales, zero
points, bias) are sliced with the rows, values per column (groups' scales, migration scale) with the columns, and values
per tensor are copied. Merging is the reverse, for layers that read one tensor.

    column parallel   every rank has some outputs     x whole          y is a slice
    row parallel      every rank has some inputs      x is a slice     y is summed over ranks, then the bias added

In a row-parallel layer a token's scale is computed over all ranks, so its codes equal those of the undivided layer.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..errors import SchemeError
from ..formats.rounding import choose_qparams, dequantize, qparams_from_range, quantize
from ..formats.scheme import TensorFormat
from ..ops.reference import migrate
from .qlinear import QLinear

_PER_TENSOR = ("input_scale", "input_zero_point")


def slice_outputs(layer: QLinear, start: int, stop: int) -> QLinear:
    """The layer that computes outputs `start` to `stop` of `layer`.

    Raises SchemeError if the bounds cut a block of rows that share a scale.
    """
    step = layer.scheme.weight.tile(layer.weight.shape)[0] if layer.scheme.weight.block_size else 1
    _require_whole(start, stop, layer.out_features, step, "out_features")

    def rows(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == 1 and layer.scheme.weight.granularity == "tensor":
            return tensor
        return tensor[start // step : -(-stop // step)]

    return _with_buffers(layer, layer.weight[start:stop], rows, lambda bias: bias[start:stop], lambda s: s)


def slice_inputs(layer: QLinear, start: int, stop: int) -> QLinear:
    """The layer on inputs `start` to `stop` of `layer`, without bias; slices' outputs add up to the layer's.

    Raises SchemeError if the bounds cut a group or block of columns that share a scale.
    """
    fmt = layer.scheme.weight
    per_row = fmt.granularity in ("channel", "token", "tensor")
    step = 1 if per_row else fmt.tile(layer.weight.shape)[1]
    _require_whole(start, stop, layer.in_features, step, "in_features")

    def columns(tensor: Tensor) -> Tensor:
        return tensor if per_row else tensor[:, start // step : -(-stop // step)]

    return _with_buffers(layer, layer.weight[:, start:stop], columns, lambda _: None, lambda s: s[start:stop])


def _require_whole(start: int, stop: int, size: int, step: int, name: str) -> None:
    if start % step or (stop % step and stop != size):
        raise SchemeError(
            f"a slice of {name} must begin and end at multiples of {step}, which share a scale; got {start}:{stop} "
            f"of {size}: split over fewer ranks, or choose another scheme"
        )


def _with_buffers(
    layer: QLinear,
    weight: Tensor,
    scales: Callable[[Tensor], Tensor],
    bias: Callable[[Tensor], Tensor | None],
    migration: Callable[[Tensor], Tensor],
) -> QLinear:
    """A layer with the codes `weight`, and each other buffer of `layer` mapped by its function."""
    layer_part = QLinear(weight.shape[1], weight.shape[0], False, "meta", layer.dtype, scheme=layer.scheme)
    layer_part.weight = weight.contiguous()
    layer_part.weight_scale = scales(layer.weight_scale).contiguous()
    if layer.weight_zero_point is not None:
        layer_part.weight_zero_point = scales(layer.weight_zero_point).contiguous()
    if layer.migration_scale is not None:
        layer_part.migration_scale = migration(layer.migration_scale).contiguous()
    for name in _PER_TENSOR:
        setattr(layer_part, name, getattr(layer, name))
    layer_part.bias = None if layer.bias is None else bias(layer.bias)
    return layer_part.train(layer.training)


def merge(layers: Sequence[QLinear]) -> QLinear:
    """One layer whose output concatenates those of `layers`, as engines merge q/k/v and gate/up.

    Raises SchemeError unless the layers have one scheme, one width, one migration scale and one static input scale,
    and a scale per row, group or block that can be stacked.
    """
    first, *others = layers
    for other in others:
        _require_mergeable(first, other)
    merged = _with_buffers(
        first, torch.cat([layer.weight for layer in layers]), lambda s: s, lambda b: b, lambda s: s
    )
    merged.weight_scale = torch.cat([layer.weight_scale for layer in layers])
    if first.weight_zero_point is not None:
        merged.weight_zero_point = torch.cat([_required(layer.weight_zero_point) for layer in layers])
    if any(layer.bias is not None for layer in layers):
        merged.bias = torch.cat([_bias(layer) for layer in layers])
    return merged


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # layers of one scheme have the same buffers
    return tensor


def _bias(layer: QLinear) -> Tensor:
    if layer.bias is not None:
        return layer.bias
    return torch.zeros(layer.out_features, dtype=layer.dtype, device=layer.device)


def _require_mergeable(first: QLinear, other: QLinear) -> None:
    if first.scheme != other.scheme or first.in_features != other.in_features:
        raise SchemeError(
            f"merged layers need one scheme and width; got {first.scheme.name!r} with in_features "
            f"{first.in_features} and {other.scheme.name!r} with {other.in_features}"
        )
    fmt = first.scheme.weight
    if fmt.granularity == "tensor" or (fmt.block_size and first.out_features % fmt.block_size[0]):
        raise SchemeError(f"weights with scales per {fmt.granularity} cannot be stacked row by row")
    for name in ("migration_scale", *_PER_TENSOR):
        first_value, other_value = getattr(first, name), getattr(other, name)
        if (first_value is None) != (other_value is None) or (
            first_value is not None and not torch.equal(first_value, other_value)
        ):
            raise SchemeError(
                f"merged layers read one tensor, so their {name} must be equal: quantize them as a group"
            )


def merge_qkv(
    q: QLinear, k: QLinear, v: QLinear, *, num_heads: int, num_kv_heads: int, rank: int = 0, ranks: int = 1
) -> QLinear:
    """The merged q, k and v of one rank. With fewer kv heads than ranks, neighbouring ranks hold the same kv head.

    Rank r has heads [r · num_heads / ranks, ...) of q; of k and v likewise, or head r // (ranks / num_kv_heads).
    Raises SchemeError if the heads cannot be divided over the ranks.
    """
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise SchemeError(f"{num_heads} heads and {num_kv_heads} kv heads do not divide over {ranks} ranks")
    shards, copies = min(ranks, num_kv_heads), max(1, ranks // num_kv_heads)
    kv = [_shard(layer, rank // copies, shards) for layer in (k, v)]
    return merge([_shard(q, rank, ranks), *kv])


def _shard(layer: QLinear, index: int, count: int) -> QLinear:
    size = layer.out_features // count
    return slice_outputs(layer, index * size, (index + 1) * size)


class _RowParallelQLinear(QLinear):
    """A `QLinear` on a slice of the inputs; its output is summed over the ranks of `_group`."""

    _group: dist.ProcessGroup

    def forward(self, input: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """input (*, in / ranks) → y (*, out), whole on every rank."""
        if isinstance(input, tuple):
            y, dtype = self._codes_product(*input), self.dtype
        else:
            self._check(input)
            y, dtype = self._partial_output(input), input.dtype
        dist.all_reduce(y, group=self._group)
        return (y if self.bias is None else y + self.bias).to(dtype)

    def _partial_output(self, x: Tensor) -> Tensor:
        activation, migrated = self.scheme.activation, migrate(x, self.migration_scale)
        if activation is None:
            return migrated @ self._migrated_weight().t()
        scale, zero_point = self._qparams_over_ranks(migrated, activation)
        codes = quantize(migrated, scale, zero_point, activation)
        if self._is_integer:
            return self._codes_product(codes, scale, zero_point)
        return dequantize(codes, scale, zero_point, activation) @ self._migrated_weight().t()

    def _codes_product(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        zero_point = None if zero_point is None else zero_point.to(codes.dtype)
        layer = (self.weight, self.weight_scale, None, None)
        return ops.codes_linear(codes, scale, zero_point, *layer, torch.float32)

    def _qparams_over_ranks(self, x: Tensor, activation: TensorFormat) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point that the undivided layer would choose for x."""
        if activation.has_global_scale:
            return choose_qparams(x, activation, global_scale=self.input_scale)
        if self.input_scale is not None:
            return self.input_scale, self.input_zero_point
        columns = activation.tile(x.shape)[1]
        tiles = x.reshape(*x.shape[:-1], -1, columns)
        ends = torch.stack([-tiles.amin(-1), tiles.amax(-1)])
        if activation.group_size is None:
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return qparams_from_range(-ends[0], ends[1], activation)


class ColwiseQLinear(ParallelStyle):
    """Style for `parallelize_module`: every rank computes a slice of a `QLinear`'s outputs from the whole input.

    gather_output: return the whole output on every rank; otherwise the slice, for a row-parallel layer.
    """

    def __init__(self, *, gather_output: bool = False) -> None:
        super().__init__()
        self.gather_output = gather_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, ranks = _checked_layer(module, device_mesh, "out_features")
        _assume_buffers(layer, _shard(layer, rank, ranks))
        layer.register_forward_pre_hook(_localize_input(device_mesh, Replicate()))
        if self.gather_output:
            layer.register_forward_hook(lambda _, args, y: _gather_output(y, device_mesh))
        return layer


class RowwiseQLinear(ParallelStyle):
    """Style for `parallelize_module`: every rank takes a slice of a `QLinear`'s inputs, and gets the whole output.

    The input is the rank's slice of the last dimension, as a column-parallel layer returns it.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, ranks = _checked_layer(module, device_mesh, "in_features")
        size, bias = layer.in_features // ranks, layer.bias
        _assume_buffers(layer, slice_inputs(layer, rank * size, (rank + 1) * size))
        layer.bias = bias
        # parallelize_module keeps the module object, so the object changes its class, as with fully_shard.
        layer.__class__ = _RowParallelQLinear
        layer._group = device_mesh.get_group()
        layer.register_forward_pre_hook(_localize_input(device_mesh, Shard(-1)))
        return layer


def _checked_layer(module: nn.Module, mesh: DeviceMesh, side: str) -> tuple[QLinear, int, int]:
    """The layer, this rank, and the number of ranks. Raises SchemeError if `side` does not divide over them."""
    if not isinstance(module, QLinear):
        raise SchemeError(f"this style divides a QLinear; got a {type(module).__name__}")
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if getattr(module, side) % ranks:
        raise SchemeError(f"{side} {getattr(module, side)} does not divide over {ranks} ranks")
    return module, rank, ranks


def _assume_buffers(layer: QLinear, part: QLinear) -> None:
    """Give `layer` the sizes and buffers of `part`, keeping the module object."""
    layer.in_features, layer.out_features = part.in_features, part.out_features
    for name in dict(layer._buffers):
        setattr(layer, name, getattr(part, name))


def _localize_input(
    mesh: DeviceMesh, placement: Placement
) -> Callable[[nn.Module, tuple[object, ...]], object]:
    """A pre-hook that converts a distributed input to this rank's part; a plain tensor is that part already."""

    def localize(module: nn.Module, args: tuple[object, ...]) -> object:
        x = args[0]
        return (x.redistribute(mesh, [placement]).to_local(),) if isinstance(x, DTensor) else None

    return localize


def _gather_output(y: Tensor, mesh: DeviceMesh) -> Tensor:
    parts = [torch.empty_like(y) for _ in range(mesh.size())]
    dist.all_gather(parts, y.contiguous(), group=mesh.get_group())
    return torch.cat(parts, -1)
