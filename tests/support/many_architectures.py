"""Tiny random models of many architectures, saved as checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "new_decoder_architecture": True,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "attention_bias": True},
    "qwen3": {**_SMALL, "tie_word_embeddings": True},
    "gemma3_text": {**_SMALL, "tie_word_embeddings": True},
    "gemma2": {**_SMALL, "tie_word_embeddings": True},
    "gpt2": {**_GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {**_SMALL, **_EXPERTS},
    "qwen2_moe": {**_SMALL, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "phi3": {**_SMALL},
    "falcon": {**_FALCON, "num_kv_heads": 2, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deepseek_v3": {**_SMALL, **_EXPERTS, **_MLA, **_DEEPSEEK, "num_key_value_heads": 4},
}


def build(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    options = dict(ARCHITECTURES[architecture])
    config = AutoConfig.for_model(architecture, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return model.eval()


def save(
    architecture: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> PreTrainedModel:
    """Build a model, save it, and return what `from_pretrained` makes of the folder."""
    build(architecture, dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
