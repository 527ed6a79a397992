"""The --device option, and jobs on a simulated device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qlinear.cli.commands import app
from qlinear.errors import DeviceError
from qlinear.runtime.device import within_memory

from ..support.models import contents

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("selection", ["writes_there", "not writes_there"])
def test_jobs_on_a_pretended_device(selection: str) -> None:
    """In a process of its own: a backend cannot be unregistered from torch, which then consults it everywhere."""
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-k",
        selection,
        str(here.parents[1] / "support" / "on_pretended_device.py"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=here.parents[2])
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["quantize", "calibrate", "evaluate", "generate"])
def test_commands_take_a_device(command: str, tmp_path: Path) -> None:
    rest = {"quantize": [str(tmp_path / "out")], "calibrate": [str(tmp_path / "s.pth")], "generate": ["a"]}
    process = CliRunner().invoke(app, [command, "demo", *rest.get(command, []), "--device", "cuda"])
    assert isinstance(process.exception, DeviceError)
    assert "--device cpu" in str(process.exception)
    assert contents(tmp_path) == {}


def test_too_little_memory_is_reported_in_one_line() -> None:
    line = r"cuda:1 has too little memory \(CUDA out of memory\): .* --device cpu$"
    with pytest.raises(DeviceError, match=line), within_memory(torch.device("cuda:1")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
