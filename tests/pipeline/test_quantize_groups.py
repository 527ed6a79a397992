"""The error that is told of a linear that no data was seen of."""

import pytest
import torch

from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import get_scheme
from qlinear.pipeline.quantize_block import _joined_notes
from qlinear.pipeline.quantize_groups import relative, relative_error


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w8a8-static"])
@pytest.mark.parametrize("shape", [(3, 128), (700, 1024)])
def test_the_error_of_codes_is_that_of_what_they_stand_for(scheme: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = quantize_tensor(matrix, get_scheme(scheme).weight)
    assert relative_error(weight, matrix) == pytest.approx(relative(weight.dequantize(), matrix), rel=0.02)


def test_the_error_is_measured_on_rows_from_all_over_the_weight() -> None:
    """Outliers in a third of the rows, which cost the rest of their row: neither its first nor its last rows tell."""
    matrix = torch.randn(900, 256, generator=torch.Generator().manual_seed(0))
    matrix[300:600, 0] = 40
    weight = quantize_tensor(matrix, get_scheme("w4a16-channel").weight)
    assert relative_error(weight, matrix) == pytest.approx(relative(weight.dequantize(), matrix), rel=0.05)


def test_the_error_of_nothing_is_none() -> None:
    matrix = torch.zeros(4, 128)
    assert relative_error(quantize_tensor(matrix, get_scheme("w8a8").weight), matrix) == 0


def test_the_same_words_on_several_linears_are_one_note() -> None:
    notes = _joined_notes(["a.0: wide: ranges", "b: other", "a.1, a.2: wide: ranges"])
    assert notes == ("a.0, a.1, a.2: wide: ranges", "b: other")
