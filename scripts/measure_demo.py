"""What W8A8 costs the embedded model, with its planted outliers and without, for three ways of smoothing.

    python scripts/measure_demo.py

A self-contained simulation in float32, not the library's job: int8 per output channel for weights, int8 per token
for inputs, every linear but the output head; smoothing (alpha 0.5) folded by hand as this one architecture needs it.
It decides how strong the planted outliers are, and says so independently of the code that it is there to exercise.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qlinear import demo
from qlinear.data import tokenize
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import get_scheme

SCHEME = get_scheme("w8a8")
SEQ_LEN = 512


def linears(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """The linears that are quantized."""
    return {name: m for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def input_absmax(model: LlamaForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """absmax over tokens of each input channel of each linear, (in,)."""
    found: dict[str, Tensor] = {}

    def observe(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        seen = args[0].flatten(0, -2).abs().amax(0)
        found[name] = torch.maximum(found.get(name, seen), seen)

    hooks = [m.register_forward_pre_hook(partial(observe, name)) for name, m in linears(model).items()]
    for batch in tokens.split(8):
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, and the producer that their smoothing folds into.

    channel: (in,) the producer's channel that each input column carries.
    """

    producer: nn.Module
    consumers: list[nn.Linear]
    channel: Tensor
    absmax: Tensor

    def scale(self) -> Tensor:
        """s over the producer's channels at alpha 0.5: sqrt(a / w) (Xiao et al. 2023, eq. 4)."""
        w = torch.stack([linear.weight.abs().amax(0) for linear in self.consumers]).amax(0)
        a, w = (
            torch.zeros(len(self.producer.weight)).scatter_reduce(0, self.channel, each, "amax")
            for each in (self.absmax, w)
        )
        return torch.where((a > 0) & (w > 0), (a / w).sqrt(), 1.0)

    def fold(self, s: Tensor) -> None:
        """Divide the producer's channels by s, and multiply the columns that read them."""
        self.producer.weight.div_(s.view(-1, *[1] * (self.producer.weight.dim() - 1)))
        for linear in self.consumers:
            linear.weight.mul_(s[self.channel])


def groups_of(model: LlamaForCausalLM, absmax: dict[str, Tensor]) -> Iterator[tuple[Group, ...]]:
    """Per layer: what reads the attention's norm, v_proj, the MLP's norm, up_proj."""
    config = model.config
    hidden, inner = torch.arange(config.hidden_size), torch.arange(config.intermediate_size)
    # Query head h reads key/value head h // repeats.
    heads = torch.arange(config.num_key_value_heads * config.head_dim).view(-1, config.head_dim)
    values = heads.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0).flatten()
    for i, layer in enumerate(model.model.layers):
        at, mlp = layer.self_attn, layer.mlp
        a = {
            name: absmax[f"layers.{i}.{name}"]
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        }
        yield (
            Group(layer.input_layernorm, [at.q_proj, at.k_proj, at.v_proj], hidden, a["self_attn.q_proj"]),
            Group(at.v_proj, [at.o_proj], values, a["self_attn.o_proj"]),
            Group(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], hidden, a["mlp.gate_proj"]),
            Group(mlp.up_proj, [mlp.down_proj], inner, a["mlp.down_proj"]),
        )


@torch.no_grad()
def smooth_norms(model: LlamaForCausalLM, absmax: dict[str, Tensor]) -> None:
    """Fold into the norms alone."""
    for attention, _, mlp, _ in groups_of(model, absmax):
        for group in (attention, mlp):
            group.fold(group.scale())


@torch.no_grad()
def smooth_all(model: LlamaForCausalLM, absmax: dict[str, Tensor]) -> None:
    """Fold into norms, v_proj and up_proj, every s from the weights as they were."""
    for groups in groups_of(model, absmax):
        scales = [group.scale() for group in groups]
        for group, s in zip(groups, scales, strict=True):
            group.fold(s)


@torch.no_grad()
def smooth_all_last_first(model: LlamaForCausalLM, absmax: dict[str, Tensor]) -> None:
    """The same, but s of a norm's group is computed once large rows of v_proj and up_proj have been divided."""
    for groups in groups_of(model, absmax):
        for group in reversed(groups):
            group.fold(group.scale())


@torch.no_grad()
def quantize(model: LlamaForCausalLM) -> None:
    """Round every linear's weight now and its input at run time, in place."""

    def round_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (quantize_tensor(args[0], SCHEME.activation).dequantize(),)

    for linear in linears(model).values():
        linear.weight.copy_(quantize_tensor(linear.weight, SCHEME.weight).dequantize())
        linear.register_forward_pre_hook(round_input)


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """(n, seq_len, vocabulary)"""
    return torch.cat([model(batch).logits.log_softmax(-1) for batch in tokens.split(8)])


def main() -> None:
    """Print perplexities and the table of KL divergences."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    calibration = tokenize(demo.calibration_text(), tokenizer, 128, SEQ_LEN)
    evaluation = tokenize(demo.evaluation_text(), tokenizer, 128, SEQ_LEN, seed=None)
    methods: dict[str, Callable[[LlamaForCausalLM, dict[str, Tensor]], object]] = {
        "naive": lambda model, absmax: None,
        "norms smoothed": smooth_norms,
        "all smoothed": smooth_all,
        "all smoothed, last first": smooth_all_last_first,
    }
    with tempfile.TemporaryDirectory() as folder:
        sources = {"planted": demo.checkpoint_path(), "unplanted": demo.write_unplanted(folder)}
        load = {
            key: partial(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
            for key, path in sources.items()
        }
        reference = log_probabilities(load["planted"](), evaluation)
        nll = -reference[:, :-1].gather(-1, evaluation[:, 1:, None]).mean()
        print(f"{evaluation.numel()} tokens, perplexity {nll.exp():.2f}")
        for key in sources:
            absmax = input_absmax(load[key](), calibration)
            for method, apply in methods.items():
                model = load[key]()
                apply(model, absmax)
                quantize(model)
                kl = (reference.exp() * (reference - log_probabilities(model, evaluation))).sum(-1).mean()
                print(f"{key:10} {method:24} KL {kl:.3e}")


if __name__ == "__main__":
    main()
