"""A fixed sample of benchmarks/fuzz.py: damaged input is refused in one line and leaves nothing, or does no harm."""

from pathlib import Path

import pytest
from benchmarks.fuzz import prepare, run_case

# The first ones once failed: damaged tokenizers, configs, qlinear.json and quantization configs.
CASES = [
    8, 28, 88, 178, 197, 244, 265, 308, 322, 339, 1998, 2181, 2797, 5217, 6602, 7580, 8304, 8482, 9299, 9428,
    *range(1000, 1090),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return prepare(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
def test_damaged_input_is_refused_in_one_line_and_leaves_nothing(bases: list[Path]) -> None:
    assert {number: fault for number in CASES if (fault := run_case(number, bases))} == {}
