"""What a user may ask for to compute on, and jobs on a device that is pretended."""

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


@pytest.mark.parametrize("part", ["writes_there", "not writes_there"])
def test_jobs_on_a_pretended_device(part: str) -> None:
    """In a process of their own: torch cannot be made to forget a device, and asks it about everything from then on."""
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-k",
        part,
        str(here.parents[1] / "support" / "on_pretended_device.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["quantize", "calibrate", "evaluate", "generate"])
def test_commands_take_a_device(command: str, tmp_path: Path) -> None:
    rest = {"quantize": [str(tmp_path / "out")], "calibrate": [str(tmp_path / "s.pth")], "generate": ["a"]}
    done = CliRunner().invoke(app, [command, "demo", *rest.get(command, []), "--device", "cuda"])
    assert isinstance(done.exception, DeviceError)
    assert "--device cpu" in str(done.exception)
    assert contents(tmp_path) == {}


def test_too_little_memory_is_said_in_a_line() -> None:
    line = r"cuda:1 has too little memory \(CUDA out of memory\): .* --device cpu$"
    with pytest.raises(DeviceError, match=line), within_memory(torch.device("cuda:1")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
