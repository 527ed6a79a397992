"""What importing the package does, and what it offers."""

import subprocess
import sys

import qlinear

LIGHT = """
import sys, torch, qlinear
heavy = {"transformers", "triton", "datasets", "huggingface_hub", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""


PUBLIC = [
    "QLinearError",
    "Scheme",
    "TensorFormat",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "quantize_",
]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_importing_it_loads_nothing_heavy_and_touches_no_gpu() -> None:
    ran = python("-W", "error", "-c", LIGHT)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_it_can_be_run_as_a_module() -> None:
    ran = python("-m", "qlinear", "--help")
    assert ran.returncode == 0
    assert all(command in ran.stdout for command in ("quantize", "evaluate", "inspect", "generate"))


def test_public_names_change_on_purpose_only_and_are_documented() -> None:
    assert qlinear.__all__ == PUBLIC
    assert all(getattr(qlinear, name).__doc__ for name in qlinear.__all__)
