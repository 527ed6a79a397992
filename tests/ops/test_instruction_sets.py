"""The kernel tests on other instruction sets than this processor's best, in processes of their own.

oneDNN and ATen choose their kernels once per process, from the processor's capabilities or from these variables. So
each setting runs the kernel tests in a subprocess. With AVX2 and AVX512_CORE, oneDNN has no
native bfloat16 products, and its int8 products saturate.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
KERNEL_TESTS = ["ops/test_ops.py", "ops/test_weight_only.py", "ops/test_torch_int4.py", "test_functional.py"]
# Slow tests of properties that do not depend on the instruction set, or that start processes themselves.
SKIPPED = ["every_kind_of_x86", "loaded_model", "opcheck"]


@pytest.mark.parametrize(
    "setting",
    [
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
    ],
    ids=lambda setting: "+".join(setting.values()),
)
def test_kernels_pass_their_tests_on_other_instruction_sets(setting: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    selection = ["-k", f"not ({' or '.join(SKIPPED)})", *(str(TESTS / name) for name in KERNEL_TESTS)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | setting
    done = subprocess.run(
        command + selection, env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
