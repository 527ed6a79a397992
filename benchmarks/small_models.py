"""Every causal language model class of transformers, as a tiny random instance.

One set of small sizes serves almost all configs, and the configs inside them (a vision tower's, an encoder's); what a
class insists on besides is in `INSISTS`. Norms and biases are perturbed, so that no gain is 1 and no bias 0.
"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "projection_dim": 64, "image_size": 28,
    "patch_size": 14, "output_channels": 64, "out_hidden_size": 64, "output_hidden_size": 64,
    "attention_head_dim": 16, "shared_expert_intermediate_size": 32, "num_codebooks": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16,
    "state_size": 16, "lru_width": 64, "rotary_dim": 16, "n_shared_experts": 1, "num_experts_per_token": 2,
    "linear_head_dim": 16, "linear_num_heads": 4, "chunk_size": 16, "mamba_chunk_size": 16, "mamba_d_state": 16,
    "ssm_state_size": 16, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 8, "global_head_dim": 16,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "n_layers": 2, "n_heads": 4,
    "max_seq_len": 64, "ffn_hidden_size": 96, "depth": 2, "embed_dim": 64, "adapter_out_dim": 64,
}  # fmt: skip
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "block_types",
    "attn_layers",
)
# Classes of which no small random instance can be built or run, with the reason.
CANNOT_BUILD = {
    "Dots3Note": "the widths of its vision and audio adapters are fixed; its text model, Dots3NoteText, is here",
    "Gemma3n": "its vision tower needs timm and Pillow; its text model, Gemma3nText, is here",
    "Gemma4Assistant": "drafts for another model, and reads that one's keys and values",
    "Gemma4UnifiedAssistant": "drafts for another model, and reads that one's keys and values",
    "Musicgen": "transformers maps the config of the whole to the class of its decoder, which refuses it",
    "MusicgenMelody": "transformers maps the config of the whole to the class of its decoder, which refuses it",
}
LARGEST = 30_000_000

# What a class needs besides, or can't take: None drops a size.
INSISTS: dict[str, dict[str, Any]] = {
    "CohereCompassText": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    }},
    "Blt": {"encoder_hash_byte_group_vocab": 64},
    "BltGlobalTransformer": {"hidden_size": 128, "head_dim": 32},
    "BltLocalDecoder": {"hidden_size_global": 128},
    "BltLocalEncoder": {"hidden_size_global": 128},
    "DbrxAttention": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    "Dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "FalconH1": {"mamba_d_ssm": 128},
    "Gemma3nText": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
    },
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "KimiLinear": {"num_key_value_heads": 4, "qk_head_dim": 32},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "Mamba2": {"num_heads": 8, "n_groups": 2, "head_dim": 16},
    "Qwen4ExpText": {
        "layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 4, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "hc_lowrank": 16,
    },
    "Reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "num_attention_heads": 4, "attention_head_size": 16,
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "feed_forward_size": 96, "num_buckets": 4, "hash_seed": 0,
    },
    "Xmod": {"default_language": "en_XX"},
    "Zamba": {
        "num_hidden_layers": 6, "mamba_expand": 2, "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
    "Zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "Zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "adapter_rank": 8},
}  # fmt: skip


def classes() -> list[type[PreTrainedConfig]]:
    """The config class of every causal language model that transformers maps."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()), key=lambda config: config.__name__)


def small_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config of that class with small sizes, its inner configs too."""
    insists = INSISTS.get(config_class.__name__.removesuffix("Config"), {})
    try:
        whole = config_class()
    except Exception:
        return config_class(**insists)
    inner = {
        key: small_config(type(getattr(whole, key)))
        for key in config_class.sub_configs
        if isinstance(getattr(whole, key, None), PreTrainedConfig)
    }
    sizes = {key: value for key, value in SIZES.items() if _has(whole, key)}
    if "kv_lora_rank" in sizes:  # latent attention expands its keys and values for every head
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    # A model that alternates kinds of layers shows each kind in its last two and first two.
    lists = {
        key: _shown(getattr(whole, key)) for key in PER_LAYER if isinstance(getattr(whole, key, None), list)
    }
    longest = max([2, *(len(value) for value in lists.values())])
    layers = {key: longest for key in ("num_hidden_layers", "n_layer", "num_layers") if key in sizes}
    # What a class finds inconsistent it may do without.
    for some in (sizes | lists | layers, sizes):
        try:
            return config_class(**some | insists | inner)
        except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            continue
    return config_class(**insists | inner)


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


def small_model(config_class: type[PreTrainedConfig], seed: int = 0) -> PreTrainedModel:
    """A random instance in float32, perturbed."""
    torch.manual_seed(seed)
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
