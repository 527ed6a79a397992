"""vLLM's linear layers with a migration scale: the input is divided by it, and the engine's own layer does the rest.

    create    every linear that may have a vector gets `migration_scale` (parts, in), one row for each of its parts
              (q, k, v of a merged qkv; one row where nothing is merged), all ones
    load      each part of the file fills its row; a row-parallel rank takes its slice of `in`, all others take it whole
    settle    after loading the rows must be equal, and one vector (in,) is left; none, where the file has none
    apply     x / migration_scale in float32, cast back, before the engine quantizes its tokens

What the file has decides which layers divide, so nothing has to be written in the config. A row for each part lets a
merge of unequal vectors be found wherever it comes from, a missing vector included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import BasevLLMParameter

from ..errors import CheckpointError

_ROWS = {"q": 0, "k": 1, "v": 2, "index_q": 3, "index_k": 4}


class MigrationScale(BasevLLMParameter):
    """The vectors (parts, in / ranks) float32 of one layer while it is loaded.

    layer_name: for errors. in_features: of the undivided layer. is_loaded: whether the file had any of them.
    """

    def __new__(cls, data: Tensor, *_: Any) -> "MigrationScale":
        """The tensor; what else a layer's vector has is set by `__init__`."""
        made: MigrationScale = super().__new__(cls, data=data)
        return made

    def __init__(self, data: Tensor, layer_name: str, in_features: int) -> None:
        super().__init__(data=data, weight_loader=load_vector)
        self.layer_name, self.in_features, self.is_loaded = layer_name, in_features, False


def load_vector(param: MigrationScale, loaded: Tensor, shard: Any = None) -> None:
    """Put a vector (in,) of the file into the rows of its parts.

    shard: the engine's name of the part; several in a tuple; None for all. Raises CheckpointError for another length.
    """
    if loaded.shape != (param.in_features,):
        raise CheckpointError(
            f"{param.layer_name}.migration_scale must have shape ({param.in_features},), one number for each input; "
            f"got {tuple(loaded.shape)}: quantize the model again"
        )
    width = param.shape[1]
    start = 0 if width == param.in_features else param.tp_rank * width
    param.data[_rows(shard)] = loaded[start : start + width].to(param)
    param.is_loaded = True


def _rows(shard: Any) -> Any:
    if shard is None:
        return slice(None)
    if isinstance(shard, tuple | list):
        return [_rows(each) for each in shard]
    return _ROWS.get(shard, shard)


def create_vector(layer: Any, name: str, in_features: int, width: int, parts: int) -> None:
    """Give a layer, of which this rank has `width` of its inputs, a place for its vectors."""
    rows = torch.ones(parts, width, dtype=torch.float32)
    layer.register_parameter("migration_scale", MigrationScale(rows, name, in_features))


def settle_vector(layer: Any, name: str) -> None:
    """Leave one vector (in,) of the loaded rows, or None. Raises CheckpointError where rows differ."""
    rows = layer.migration_scale
    if not rows.is_loaded:
        layer.migration_scale = None
        return
    if not torch.equal(rows.data, rows.data[:1].expand_as(rows)):
        raise CheckpointError(
            f"the linears that vLLM merges into {name} read one tensor, so their migration scales must be equal, and "
            "in this checkpoint they differ or some are missing: quantize the model again"
        )
    layer.migration_scale = nn.Parameter(rows.data[0].clone(), requires_grad=False)
    # Nothing may quantize the input before it is divided: no fusion of activation and quantization.
    layer.requires_unquantized_input = True


def divide(layer: Any, x: Tensor) -> Tensor:
    """x (*, in) over the layer's vector, in float32, as x's own dtype."""
    scale = layer.migration_scale
    return x if scale is None else (x / scale).to(x.dtype)


class MigratingScheme(CompressedTensorsScheme):
    """One of the engine's schemes, on inputs divided by the layer's vector."""

    def __init__(self, inner: CompressedTensorsScheme, layer_name: str) -> None:
        self.inner, self.layer_name = inner, layer_name

    @classmethod
    def get_min_capability(cls) -> int:
        """Of dividing: any device. The inner scheme's own is checked where it is chosen."""
        return 0

    def create_weights(self, layer: Any, **sizes: Any) -> None:
        """The scheme's own parameters, and a place for the vector."""
        self.inner.create_weights(layer=layer, **sizes)
        parts = len(sizes["output_partition_sizes"])
        width, whole = sizes["input_size_per_partition"], sizes["input_size"]
        create_vector(layer, self.layer_name, whole, width, parts)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the vector, and let the scheme lay out its weights for its kernel."""
        settle_vector(layer, self.layer_name)
        self.inner.process_weights_after_loading(layer)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (*, in) → y (*, out)."""
        y: Tensor = self.inner.apply_weights(layer, divide(layer, x), bias)
        return y


class MigratingFloatMethod(LinearMethodBase):
    """A float linear on inputs divided by its vector.

    It is no UnquantizedLinearMethod, so that no one who finds one of these takes the weight for the whole layer.
    """

    def __init__(self, layer_name: str) -> None:
        self.inner, self.layer_name = UnquantizedLinearMethod(), layer_name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """The weight, and a place for the vector."""
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        self.inner.create_weights(layer, *sizes, params_dtype, **attributes)
        create_vector(
            layer, self.layer_name, input_size, input_size_per_partition, len(output_partition_sizes)
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the vector, which the config has promised. Raises CheckpointError."""
        if not layer.migration_scale.is_loaded:
            raise CheckpointError(
                f"{self.layer_name}.migration_scale is missing, though config.json names it: quantize the model again"
            )
        settle_vector(layer, self.layer_name)
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (*, in) → y (*, out)."""
        y: Tensor = self.inner.apply(layer, divide(layer, x), bias)
        return y
