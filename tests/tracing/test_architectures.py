"""Smoothing leaves the logits of every architecture as they were, and misses no weight that multiplies in a block."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import pytest

from ..support.sweep import CLASSES, Swept, sweep

# Those that no small random instance of can be built, or run by itself, and why.
NOT_BUILT = {
    "Dots3Note": "the widths of its vision and audio adapters are fixed; its text model, Dots3NoteText, is here",
    "Gemma3n": "its vision tower needs timm and Pillow; its text model, Gemma3nText, is here",
    "Gemma4Assistant": "drafts for another model, and reads that one's keys and values",
    "Gemma4UnifiedAssistant": "drafts for another model, and reads that one's keys and values",
    "Musicgen": "transformers maps the config of the whole to the class of its decoder, which refuses it",
    "MusicgenMelody": "transformers maps the config of the whole to the class of its decoder, which refuses it",
}
# XLNet's raw parameters of three dimensions multiply in einsums that are no linear layers: they are named, and stay.
UNREAD = {"XLNet"}

# One of each kind: plain, biased, 1 + gain, fused, parallel, sandwiched, transposed, clipped, without gains, with
# latent attention, with experts in a list, in a stack, batched, cut from one matrix, or with a bias, squared, gated by
# a linear of its own, recurrent, short-convolved; and how many of the weights fold.
KINDS = {
    "Llama": 14, "Qwen2": 14, "Qwen3": 14, "Gemma2": 14, "Gemma3Text": 42, "Phi3": 8, "Falcon": 6, "GPTNeoX": 6,
    "Cohere": 14, "Olmo": 4, "Olmo2": 4, "OPT": 12, "GPT2": 6, "Bloom": 6, "StableLm": 14, "Mixtral": 26, "GptOss": 18,
    "Llama4Text": 64, "Nemotron": 12, "Arcee": 12, "DeepseekV3": 25, "Dbrx": 28, "AXK2": 28, "Lfm3": 31, "Phimoe": 26,
    "JetMoe": 38, "Mamba": 4, "Qwen3Next": 20, "Bart": 4,
}  # fmt: skip
# What the throw-away probe that this began with folded of the linears in these models.
LEAST_SHARE = 1291 / 2206


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes that share the tests leave what they found for each other."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen") else base) / "architectures"
    folder.mkdir(exist_ok=True)
    return folder


def noted(name: str, found: Path) -> Swept:
    """The sweep of a class, from the process that made it if one has."""
    file = found / f"{name}.json"
    if file.is_file():
        return Swept(**json.loads(file.read_text()))
    swept = sweep(name)
    unfinished = file.with_suffix(f".{id(swept)}")
    unfinished.write_text(json.dumps(asdict(swept), default=sorted))
    unfinished.replace(file)
    return swept


# Instances that are looked at where one by itself came out worse.
INSTANCES = 3


def is_worse(name: str) -> bool:
    """Whether smoothing costs instances of the class more than chance does, and more than 2%.

    In models that normalise after a layer, two large channels make most of the logits, and so two rows of a weight most
    of the error: how they happen to round changes it by half, up or down. And where norms have no gain, no channel is
    large here, so that there is nothing to gain either.
    """
    several = [sweep(name), *(sweep(name, seed) for seed in range(1, INSTANCES))]
    ratios = [math.log(s.smoothed / s.plain) for s in several if s.smoothed and s.plain]
    return mean(ratios) - 2 * stdev(ratios) / len(ratios) ** 0.5 > math.log(1.02)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NOT_BUILT))
@pytest.mark.filterwarnings("default")  # what other people's models warn of is theirs
def test_smoothing_keeps_the_logits_misses_nothing_and_costs_w8a8_nothing(name: str, found: Path) -> None:
    swept = noted(name, found)
    assert swept.difference < 1e-4
    assert not swept.missed, "a weight that multiplies is in a group, or it is named as one that is not"
    assert bool(swept.unread) == (name in UNREAD)
    assert swept.plain is not None, "every model lets its linears be replaced"
    assert swept.smoothed is not None
    # Without an nn.Linear in its blocks, as in GPT-2, a model loses nothing.
    assert not swept.plain or swept.smoothed <= swept.plain or not is_worse(name)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("default")
def test_what_can_be_folded_is(name: str, found: Path) -> None:
    swept = noted(name, found)
    assert swept.linears[0] + swept.others[0] >= KINDS[name]


@pytest.mark.filterwarnings("default")
def test_most_linears_fold_and_w8a8_gains_from_it(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    all_of = [noted(name, found) for name in sorted(CLASSES.keys() - NOT_BUILT)]
    linears, others = ([sum(counts) for counts in zip(*kind, strict=True)] for kind in (
        [s.linears for s in all_of], [s.others for s in all_of]
    ))  # fmt: skip
    compared = [(s.plain, s.smoothed) for s in all_of if s.plain and s.smoothed]
    with capsys.disabled():
        print(
            f"\n{len(all_of)} architectures: {linears[0]} of {linears[1]} linears folded, {others[0]} of {others[1]} "
            f"experts, Conv1D and raw weights; mean W8A8 error {sum(p for p, _ in compared) / len(compared):.4f} "
            f"without smoothing, {sum(s for _, s in compared) / len(compared):.4f} with ({len(compared)} compared)"
        )
    assert linears[0] / linears[1] > max(LEAST_SHARE, 0.65)
    assert sum(smoothed for _, smoothed in compared) <= sum(plain for plain, _ in compared)


@pytest.mark.parametrize("name", NOT_BUILT)
@pytest.mark.filterwarnings("default")
def test_what_is_not_built_cannot_be(name: str) -> None:
    with pytest.raises(Exception, match=r".+"):
        sweep(name)
