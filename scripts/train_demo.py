"""Train the embedded model from nothing: tokenizer, then a small Llama, on the text of `demo_corpus`.

    OMP_WAIT_POLICY=passive python scripts/train_demo.py build/demo

writes an ordinary checkpoint, without planted outliers, and the calibration and evaluation text beside it;
`plant_demo.py` makes the embedded model of it. Training is in float32 on two CPU cores, which it took an hour and a
half while they had other work to do (torch.compile, which needs a C++ compiler, is about three times as fast as eager
here). Everything is seeded: the same Python, torch and processor give the same model.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from demo_corpus import split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 2024
BOS, EOS = "<s>", "</s>"
VOCABULARY = 2048
# The dims that quantization schemes group by (128) divide hidden and intermediate sizes; four query heads share
# one key/value head; the embedding is also the output head, which keeps the file small.
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS_PER_STEP = 2048
SHORT, LONG = (
    512,
    1024,
)  # sequence lengths; the long one, all positions the config promises, for the last steps
LONG_SHARE = 0.15
PEAK_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 100, 0.1


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (it can spell any text) that puts BOS first, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONFIG["max_position_embeddings"],
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """Each document as BOS ... EOS."""
    return [
        torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts, verbose=False)["input_ids"]
    ]


def batches(documents: list[Tensor], length: int, generator: random.Random):
    """Endless (TOKENS_PER_STEP / length, length) windows of the documents, in a new order each time round."""
    rows = TOKENS_PER_STEP // length
    while True:
        shuffled = torch.cat(generator.sample(documents, len(documents)))
        windows = shuffled[: len(shuffled) // length * length].view(-1, length)
        order = generator.sample(range(len(windows)), len(windows))
        for start in range(0, len(order) - rows + 1, rows):
            yield windows[order[start : start + rows]]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[Tensor]) -> float:
    """Mean negative log likelihood per token (nats) over full windows of the evaluation documents."""
    stream = torch.cat(documents)
    windows = stream[: len(stream) // SHORT * SHORT].view(-1, SHORT)
    losses = [model(part, labels=part).loss for part in windows.split(TOKENS_PER_STEP // SHORT)]
    return torch.stack(losses).mean().item()


def unigram_loss(training: list[Tensor], held_out: list[Tensor]) -> float:
    """The same of a model that knows how often each token occurs and nothing else (add-one smoothing)."""
    counts = torch.cat(training).bincount(minlength=VOCABULARY) + 1.0
    return -(counts / counts.sum()).log()[torch.cat(held_out)].mean().item()


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW; norm gains do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train(model: LlamaForCausalLM, training: list[Tensor], held_out: list[Tensor], steps: int) -> None:
    """Next-token training, in place, with the held-out loss printed on the way."""
    generator = random.Random(SEED)
    short, long = batches(training, SHORT, generator), batches(training, LONG, generator)
    optimizer, begin = optimizer_of(model), time.monotonic()
    loss_of = torch.compile(lambda ids: model(ids, labels=ids, use_cache=False).loss, dynamic=False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        loss = loss_of(next(long if step >= (1 - LONG_SHARE) * steps else short))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            minutes = (time.monotonic() - begin) / 60
            print(f"step {step}: loss {loss.item():.3f}, {minutes:.1f} min", flush=True)
        if step % 500 == 499:
            print(f"step {step}: held-out loss {held_out_loss(model, held_out):.3f}", flush=True)


def write_texts(folder: Path, **parts: list[str]) -> None:
    """One jsonl per part, a document per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Train, and write the checkpoint and the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    evaluation, calibration, training = split()
    tokenizer = train_tokenizer(training)
    ids, held_out = encode(training, tokenizer), encode(evaluation, tokenizer)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    print(f"{model.num_parameters()} parameters, {sum(map(len, ids))} training tokens")
    train(model, ids, held_out, arguments.steps)
    perplexity, unigram = math.exp(held_out_loss(model, held_out)), math.exp(unigram_loss(ids, held_out))
    print(f"held-out perplexity {perplexity:.2f} (unigram {unigram:.1f})")
    model.to(torch.bfloat16).save_pretrained(arguments.out / "checkpoint")
    tokenizer.save_pretrained(arguments.out / "checkpoint")
    write_texts(arguments.out, calibration=calibration, evaluation=evaluation)


if __name__ == "__main__":
    main()
