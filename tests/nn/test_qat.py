"""Fine-tuning the embedded model in four bits: a few steps recover most of the loss from rounding.

Outliers disturb rounding, so the model is smoothed first. They also disturb Adam, which takes steps of one size, while
columns that read a large channel are small; so each column is trained relative to its size. The student learns the
float model's predictions and its blocks' outputs.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import qlinear
from qlinear import demo
from qlinear.data.tokens import load_tokenizer, tokenize
from qlinear.nn import FakeQuantLinear, QLinear, convert, prepare

STEPS, BATCH, LENGTH, RATE = 80, 2, 128, 2e-3
SCHEME = "w4a8"
LINEARS = 35


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student), mean over tokens. It is 0 for the float model, so it measures the loss from rounding."""
    student_outputs, teacher_outputs = (
        student.log_softmax(-1).flatten(0, 1),
        teacher.log_softmax(-1).flatten(0, 1),
    )
    return F.kl_div(student_outputs, teacher_outputs, log_target=True, reduction="batchmean")


@torch.no_grad()
def loss_on(ids: Tensor, student: nn.Module, teacher: nn.Module) -> float:
    return float(divergence(student(input_ids=ids).logits, teacher(input_ids=ids).logits))


def distance(ids: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """KL, plus the relative squared error of each block's output."""
    with torch.no_grad():
        teacher_outputs = teacher(input_ids=ids, output_hidden_states=True)
    student_outputs = student(input_ids=ids, output_hidden_states=True)
    pairs = zip(student_outputs.hidden_states[1:], teacher_outputs.hidden_states[1:], strict=True)
    blocks = sum((a - b).square().mean() / b.square().mean() for a, b in pairs)
    return divergence(student_outputs.logits, teacher_outputs.logits) + 5 * blocks


class Relative(nn.Module):
    """A parametrization: the parameter as a multiple of `size`, which broadcasts over it."""

    def __init__(self, size: Tensor) -> None:
        super().__init__()
        self.register_buffer("size", size)

    def forward(self, ratio: Tensor) -> Tensor:
        return ratio * self.size

    def right_inverse(self, parameter: Tensor) -> Tensor:
        return parameter / self.size


def train(student: nn.Module, teacher: nn.Module, batches: tuple[Tensor, ...]) -> None:
    layers = [m for m in student.model.layers.modules() if getattr(m, "weight", None) is not None]
    for layer in layers:
        weight = layer.weight.detach()
        size = weight.square().mean(0).sqrt() if weight.dim() == 2 else weight.abs()
        parametrize.register_parametrization(layer, "weight", Relative(size.clamp(min=1e-6)))
    optimizer = torch.optim.Adam(student.model.layers.parameters(), lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    for ids in batches:
        optimizer.zero_grad()
        distance(ids, student, teacher).backward()
        optimizer.step()
        schedule.step()
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoothed") / "model"
    qlinear.quantize("demo", out, "none", samples=16, seq_len=256, dtype="float32")
    return out


@pytest.mark.slow
def test_training_recovers_half_of_the_loss_from_four_bits(smoothed: Path) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(demo.checkpoint_path())
    text = tokenize(demo.calibration_text(), tokenizer, STEPS * BATCH, LENGTH, 0)
    held_out = tokenize(demo.evaluation_text(), tokenizer, 24, LENGTH, None)
    teacher, naive, student = load(demo.checkpoint_path()), load(demo.checkpoint_path()), load(smoothed)
    for model in (naive, student):
        prepare(model.model, SCHEME)
    without, before = loss_on(held_out, naive, teacher), loss_on(held_out, student, teacher)
    train(student, teacher, text.split(BATCH))
    assert sum(type(m) is FakeQuantLinear for m in student.modules()) == LINEARS
    convert(student)
    assert sum(isinstance(m, QLinear) for m in student.modules()) == LINEARS
    after = loss_on(held_out, student, teacher)
    assert after <= without / 2, "relative to the loss of the unsmoothed model in four bits"
    assert after <= before / 2, "relative to the loss of the smoothed model in four bits"
