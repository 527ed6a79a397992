"""The list of algorithms: what each says of itself, and that a new one needs its own file and the list alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qlinear
from qlinear import algorithms
from qlinear.algorithms import ALGORITHMS, Algorithm, Codes, Group, get_algorithm
from qlinear.algorithms.gptq import quantize_columns
from qlinear.errors import SchemeError
from qlinear.formats.rounding import QuantizedTensor, choose_qparams
from qlinear.formats.scheme import SCHEMES

from ..support.models import save_model


class TowardZero(Algorithm):
    """Codes of the largest magnitude that is not above the weight's."""

    name = "toward-zero"

    def quantize(self, group: Group) -> dict[str, Codes]:
        return {
            name: Codes(self._truncated(weight, group), "cut off") for name, weight in group.weights.items()
        }

    def _truncated(self, weight: Tensor, group: Group) -> QuantizedTensor:
        fmt = group.scheme.weight
        scale, _ = choose_qparams(weight, fmt, group.scale_dtype)
        return QuantizedTensor((weight / scale).trunc().to(fmt.storage), scale, None, fmt)


def test_a_new_algorithm_is_one_object_in_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "ALGORITHMS", (*ALGORITHMS, TowardZero()))
    source, ids = save_model(tmp_path / "model"), torch.arange(60).view(4, 15)
    for name in ("rtn", "toward-zero"):
        result = qlinear.quantize(
            source, tmp_path / name, "w8a16", algorithm=name, smooth="off", propagate=False, calibration=ids
        )
    assert all(any(layer.name in warning for warning in result.warnings) for layer in result.layers)
    nearest, toward_zero = (codes_of(tmp_path / name) for name in ("rtn", "toward-zero"))
    assert nearest.keys() == toward_zero.keys() != set()
    for name, codes in toward_zero.items():
        assert bool((codes.abs() <= nearest[name].abs()).all())
        assert bool((codes != nearest[name]).any())


def codes_of(folder: Path) -> Mapping[str, Tensor]:
    modules = qlinear.load(folder, dtype="float32").named_modules()
    return {name: module.weight.int() for name, module in modules if isinstance(module, qlinear.nn.QLinear)}


def test_an_unknown_algorithm_is_told_the_known_ones() -> None:
    with pytest.raises(SchemeError, match="must be rtn, gptq or awq; got 'magic'"):
        get_algorithm("magic")


def group_of(weight: Tensor) -> Group:
    x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(1))
    return Group({"w": weight}, SCHEMES["w4a16-g32"], x.amin(0), x.amax(0), x.abs().mean(0), x, x.T @ x / 40)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_every_algorithm_quantizes_with_nothing_but_what_it_needs(algorithm: Algorithm) -> None:
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    group = group_of(weight)
    if "hessian" not in algorithm.needs:
        group = replace(group, hessian=None)
    if "sample" not in algorithm.needs:
        group = replace(group, sample=group.sample[:0])
    quantized = algorithm.quantize(group)["w"].weight
    assert float((quantized.dequantize() - weight).norm() / weight.norm()) < 0.2
    assert get_algorithm(algorithm.name) is algorithm


def test_round_to_nearest_alone_needs_no_data() -> None:
    assert [algorithm.name for algorithm in ALGORITHMS if not algorithm.needs] == ["rtn"]
    assert [algorithm.name for algorithm in ALGORITHMS if not algorithm.propagates] == ["rtn"]
    assert [algorithm.name for algorithm in ALGORITHMS if not algorithm.searches_ranges] == ["rtn"]
    assert [algorithm.default_smooth for algorithm in ALGORITHMS] == [0.5, 0.5, "awq"]


def test_gptq_without_a_hessian_rounds_to_nearest() -> None:
    group = replace(group_of(torch.randn(5, 64)), hessian=None)
    nearest, codes = (get_algorithm(name).quantize(group)["w"] for name in ("rtn", "gptq"))
    assert torch.equal(codes.weight.codes, nearest.weight.codes)


def test_gptq_tells_of_a_hessian_that_it_could_not_use() -> None:
    group = replace(group_of(torch.randn(5, 64)), hessian=torch.eye(64) - 3 * (1 - torch.eye(64)))
    assert quantize_columns(group)["w"].fell_back
    assert "could not be factorized" in (get_algorithm("gptq").quantize(group)["w"].note or "")
