"""transformers loads a checkpoint in qlinear's own layout: `quant_method: "qlinear"` in its config.json.

    import qlinear
    model = AutoModelForCausalLM.from_pretrained(out)

What `from_pretrained` does then, in this order:

1. It builds the model on meta, and gives it to `QLinearQuantizer`, which finds the scheme of each linear
   (`find_layers`) and puts a `QLinear` in its place.
2. It reads the file, and passes each linear's tensors to `UnpackLinear`, which makes the layer's buffers of them. A
   stack of experts has no layer to replace: `DequantizeExperts` makes floats of its codes before they are stacked.
3. `save_pretrained` asks for the state as a file holds it, and gets the tensors packed as they were.

transformers' own loader thus does the reading: sharding, `device_map` and its progress bar work as for any model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.layouts.base import QuantizedLinear
from ..checkpoint.layouts.qlinear import QUANT_METHOD, pack
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..formats.rounding import QuantizedTensor
from ..formats.scheme import Scheme
from ..nn import QLinear, SmoothedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .find_layers import Layers
    from .load_operations import StoredScale

logger = logging.get_logger(__name__)

# The last parts of the names that a linear's tensors have in the file, its bias aside.
LEAVES = (
    *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale", "migration_scale"),
)


class QLinearConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, kept as it is. Raises CheckpointError where it is not qlinear's."""

    def __init__(self, quant_method: str = QUANT_METHOD, **entries: Any) -> None:
        if quant_method != QUANT_METHOD:
            raise CheckpointError(f"quant_method must be {QUANT_METHOD!r}; got {quant_method!r}")
        self.__dict__.update(entries, quant_method=quant_method)


class QLinearQuantizer(HfQuantizer):
    """Loads and saves models whose linears are `QLinear`s. Models are quantized by `qlinear.quantize` alone."""

    requires_calibration = True
    serialized_names = {"weight": list(LEAVES)}  # noqa: RUF012  (the base class declares it so)

    def __init__(self, quantization_config: QLinearConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: Layers | None = None
        self.stored_scales: dict[str, StoredScale] = {}

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from .find_layers import find_layers

        if not checkpoint_files:
            raise CheckpointError(
                "a qlinear checkpoint is loaded from its folder: pass that, not a state_dict"
            )
        self.layers = find_layers(model, Checkpoint.open(Path(checkpoint_files[0]).parent))
        for name, scheme in self.layers.schemes.items():
            layer = _empty_qlinear(model.get_submodule(name), scheme, name in self.layers.migrated)
            model.set_submodule(name, layer)
        for name in self.layers.holders:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            scale = torch.empty(linear.in_features, device="meta")
            model.set_submodule(name, SmoothedLinear.from_float(linear, scale))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        """Forget how the tensors were unpacked: `get_state_dict_and_metadata` packs them."""
        ours = (*self.get_load_operations().values(),)
        conversions: list[Any] = getattr(model, "_weight_conversions", None) or []
        kept = [
            conversion
            for conversion in conversions
            if not any(isinstance(operation, ours) for operation in getattr(conversion, "operations", ()))
        ]
        vars(model)["_weight_conversions"] = kept

    def get_load_operations(self) -> dict[str, Any]:
        """The operations of transformers' loader, by what they do."""
        from .load_operations import DequantizeExperts, UnpackLinear

        return {"deserialize": UnpackLinear, "dequantize": DequantizeExperts}

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model's tensors as a file holds them."""
        state = dict(model.state_dict())
        for name, layer in model.named_modules():
            if isinstance(layer, QLinear):
                for leaf in LEAVES:
                    state.pop(f"{name}.{leaf}", None)
                state |= pack(name, _held(layer, self.stored_scales[name]))
        return state, {}

    def is_serializable(self) -> bool:
        """Whether the model can be saved as it was loaded: not where experts were dequantized."""
        if self.layers is None or self.layers.stacks:
            logger.warning("experts are dequantized on loading: copy the folder instead of saving the model")
            return False
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def register() -> None:
    """Make the method known to transformers; nothing where it is known already."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(QLinearConfig)
        register_quantizer(QUANT_METHOD)(QLinearQuantizer)


def _empty_qlinear(linear: nn.Module, scheme: Scheme, has_migration_scale: bool) -> QLinear:
    """The layer that takes the place of a linear, on meta as that is."""
    assert isinstance(linear, nn.Linear)
    shape = linear.in_features, linear.out_features
    layer = QLinear(*shape, linear.bias is not None, "meta", linear.weight.dtype, scheme=scheme)
    if has_migration_scale:
        layer.migration_scale = torch.empty(linear.in_features, device="meta")
    return layer


def _held(layer: QLinear, stored: "StoredScale") -> QuantizedLinear:
    """What a layout packs of a layer."""
    codes, scale, zero_point = layer.weight, layer.weight_scale, layer.weight_zero_point
    weight = QuantizedTensor(codes, scale, zero_point, layer.scheme.weight, stored.global_scale)
    return QuantizedLinear(
        layer.scheme, weight, stored.dtype, layer.input_scale, layer.input_zero_point, layer.migration_scale
    )
