"""Tiny checkpoints for the tests of the job and of the command line: random weights, and a tokenizer of words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()  # what a fixture prints must not be taken for what the command printed

VOCABULARY = 97
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NOT_FALCONS = ("head_dim", "num_key_value_heads")


def save_model(
    folder: Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **options: Any,
) -> Path:
    """Save a model whose every parameter is random, norms and biases included, and return its folder."""
    small = {k: v for k, v in _SMALL.items() if architecture != "falcon" or k not in _NOT_FALCONS}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(small | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """Save a tokenizer of the words w3 ... beside a model."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint that is one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
