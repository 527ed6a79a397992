"""The float models that are quantized and served, and the tokens that they are compared on.

    demo       the embedded Llama, and its evaluation text
    mixture    a random Qwen3-MoE: one dense block, one of experts; a single kv head, which two ranks both hold
    fused      a random Phi-3, whose file has q, k, v as one matrix and gate and up as another
    unfolded   a random Starcoder2: biases, and a GELU before the last linear, into which no smoothing can be folded

A random model knows no text, so it is compared on tokens that it drew itself; its output head is scaled up so that its
choices matter. All widths are multiples of 128 on two ranks too, so that groups and packed words divide.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlinear.streaming.open_model import evaluation_ids, open_model

VOCABULARY = 512
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXTURE = {
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "mlp_only_layers": [0],
    "tie_word_embeddings": False,
}
RANDOM = {
    "mixture": ("qwen3_moe", _SMALL | _MIXTURE),
    "fused": ("phi3", _SMALL | {"num_key_value_heads": 2}),
    "unfolded": ("starcoder2", _SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
}
KINDS = ("demo", *RANDOM)
_HEAD_SCALE = 8.0  # enough that choices matter, not so much that bfloat16's rounding does
_SEQUENCES, _LENGTH = 32, 64


def make_source(kind: str, folder: Path) -> str:
    """Write the model and its tokens (`<kind>.json`) below a folder; what `quantize` takes for the model."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "demo":
        ids = evaluation_ids("demo", open_model("demo"), _SEQUENCES * _LENGTH, _LENGTH)
        model = "demo"
    else:
        built = _build(*RANDOM[kind])
        built.to(torch.bfloat16).save_pretrained(folder / kind)
        _save_tokenizer(folder / kind)
        ids, model = _draw(built.float()), str(folder / kind)
    (folder / f"{kind}.json").write_text(json.dumps(ids.tolist()))
    return model


def _build(architecture: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lm_head" in name:
                parameter.mul_(_HEAD_SCALE)
            else:
                parameter.mul_(2.0)
    return model.eval()


@torch.no_grad()
def _draw(model: PreTrainedModel) -> torch.Tensor:
    """Token ids (sequences, length) from the model's own distribution."""
    ids = torch.randint(3, VOCABULARY, (_SEQUENCES, 1))
    past = None
    for _ in range(_LENGTH - 1):
        output = model(ids[:, -1:] if past is not None else ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        ids = torch.cat([ids, output.logits[:, -1].softmax(-1).multinomial(1)], 1)
    return ids


def _save_tokenizer(folder: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
