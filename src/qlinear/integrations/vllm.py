"""The vLLM plugin: it serves checkpoints whose linears keep a migration scale.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes, before it reads a
model. Two quantization methods are known from then on:

    qlinear         compressed-tensors' tensors and config, with `migration_scale` beside some linears
    smooth_quant    LMDeploy's layout, with or without it

Both are the engine's own compressed-tensors config: it chooses the scheme of every layer, and its kernels run. All that
is added is a division of the input, in `vllm_linear`. Experts of a mixture have no vector and stay with the engine.
"""

from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.models.utils import WeightsMapper

from .vllm_linear import MigratingFloatMethod, MigratingScheme
from .vllm_lmdeploy import RENAMED, as_compressed_tensors

# Some models tell the config of a merge only after their layers are built (Qwen3-MoE's dense blocks).
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def register() -> None:
    """Make the methods known to vLLM; calling it again changes nothing."""
    register_quantization_config("qlinear")(QLinearConfig)
    register_quantization_config("smooth_quant")(LMDeployConfig)
    register_weight_loader_v2_supported_method(MigratingFloatMethod)


class QLinearConfig(CompressedTensorsConfig):
    """`quant_method: "qlinear"`.

    float_holders: the float linears that have a vector, by the engine's names; quantized ones need no such list.
    """

    float_holders: frozenset[str] = frozenset()

    def get_name(self) -> str:
        """The name in config.json."""
        return "qlinear"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QLinearConfig":
        """Of config.json's `quantization_config`."""
        made: QLinearConfig = super().from_config(config)
        made.float_holders = frozenset(config.get("migration_scale", ()))
        return made

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note the number of heads, as the engine does for compressed-tensors alone: scales per head need it."""
        super().maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        text = None if hf_config is None else hf_config.get_text_config()
        self.total_num_heads = getattr(text, "num_attention_heads", None)
        self.total_num_kv_heads = getattr(text, "num_key_value_heads", None) or self.total_num_heads

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Names of the file become names of the engine."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.float_holders = frozenset(hf_to_vllm_mapper.apply_list(list(self.float_holders)))

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> MigratingScheme | None:
        """The engine's scheme for a quantized linear, on divided inputs; None for a float one."""
        scheme = super().get_scheme(layer, layer_name)
        return None if scheme is None else MigratingScheme(scheme, layer_name or "a linear")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The engine's method, unless the layer is a float linear that has a vector."""
        if isinstance(layer, LinearBase) and self._has_vector_in_float(prefix):
            return MigratingFloatMethod(prefix)
        return super().get_quant_method(layer, prefix)

    def _has_vector_in_float(self, prefix: str) -> bool:
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, _MERGED.get(leaf, ()))
        return any(f"{parent}.{part}" in self.float_holders for part in (leaf, *parts))


class LMDeployConfig(QLinearConfig):
    """`quant_method: "smooth_quant"`, LMDeploy's W8A8 layout."""

    def get_name(self) -> str:
        """The name in config.json."""
        return "smooth_quant"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QLinearConfig":
        """Of config.json's `quantization_config`. Raises CheckpointError for a quant_dtype that is not known."""
        return super().from_config(as_compressed_tensors(config))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """The engine's own renaming of tensors, and that of the scales."""
        own = CompressedTensorsConfig.get_checkpoint_weight_mapper()
        return own | WeightsMapper(orig_to_new_suffix=RENAMED)
