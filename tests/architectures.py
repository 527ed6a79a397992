"""Every causal language model class of transformers, as a tiny random instance.

One set of small sizes serves almost all configs; what a class insists on besides is in `INSISTS`. Norms and biases are
perturbed, so that no gain is 1 and no bias 0.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_embd": 64, "n_layer": 2, "n_head": 4, "d_model": 64, "num_layers": 2,
    "num_heads": 4, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "max_position_embeddings": 64, "n_positions": 64, "moe_intermediate_size": 32, "ffn_dim": 96,
    "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "encoder_layers": 2, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
    "attention_head_dim": 16, "shared_expert_intermediate_size": 32, "num_codebooks": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16,
    "state_size": 16, "lru_width": 64, "rotary_dim": 16,
}  # fmt: skip
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types")
LARGEST = 30_000_000


def classes() -> list[type[PreTrainedConfig]]:
    """The config class of every causal language model that transformers maps."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING.keys(), key=lambda config: config.__name__)


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of that class with small sizes."""
    whole = config_class()
    text = whole.get_text_config()
    sizes = {key: value for key, value in SIZES.items() if _has(text, key)}
    if "kv_lora_rank" in sizes:  # latent attention expands its keys and values for every head
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    # A model that alternates kinds of layers shows each kind in its last two and first two.
    lists = {
        key: _shown(getattr(text, key)) for key in PER_LAYER if isinstance(getattr(text, key, None), list)
    }
    longest = max([2, *(len(value) for value in lists.values())])
    layers = {key: longest for key in ("num_hidden_layers", "n_layer", "num_layers") if key in sizes}
    try:
        small = type(text)(**sizes | lists | layers)
    except Exception:
        small = type(text)(**sizes)
    return small if type(text) is type(whole) else config_class(text_config=small.to_dict())


def _shown(kinds: list[Any]) -> list[Any]:
    """The shortest beginning that shows every kind of layer, at least two."""
    length = next(n for n in range(1, len(kinds) + 1) if set(map(str, kinds[:n])) == set(map(str, kinds)))
    return kinds[: max(2, length)]


def _has(config: PreTrainedConfig, key: str) -> bool:
    if isinstance(getattr(type(config), key, None), property):  # computed from others, and not to be set
        return False
    try:
        return hasattr(config, key)
    except Exception:
        return False


def small_model(config_class: type[PreTrainedConfig]) -> PreTrainedModel:
    """A random instance in float32, perturbed."""
    torch.manual_seed(0)
    config = small_config(config_class)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters, however small its text model is")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.config.use_cache = False
    return model.eval()
