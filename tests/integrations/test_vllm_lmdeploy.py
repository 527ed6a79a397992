"""LMDeploy's config in compressed-tensors' words: the same linears in the same scheme, the same ones left in float."""

import re

import pytest
from torch import nn

from qlinear import QLinearError
from qlinear.checkpoint.layouts import compressed_tensors, lmdeploy
from qlinear.formats.scheme import get_scheme
from qlinear.integrations.vllm_lmdeploy import as_compressed_tensors, ignore_patterns

LINEARS = {
    name: nn.Linear(1, 1, device="meta")
    for name in (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.my_lm_head_adapter",
        "lm_head",
    )
}


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_both_configs_quantize_the_same_linears_alike(scheme: str) -> None:
    config = lmdeploy.quantization_config(get_scheme(scheme), ["lm_head", "model.layers.1"])
    own = lmdeploy.schemes_from_config(config, LINEARS)
    said = compressed_tensors.schemes_from_config(as_compressed_tensors(config), LINEARS)
    assert said == own
    assert set(own) == {"model.layers.0.mlp.up_proj", "model.my_lm_head_adapter"}


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(QLinearError, match="quant_dtype 'int3': int8 and float8_e4m3fn can be served"):
        as_compressed_tensors({"quant_dtype": "int3"})


def test_a_part_of_a_name_stands_for_every_module_that_has_it() -> None:
    exact, pattern = ignore_patterns(["mlp.gate"])
    assert exact == "mlp.gate"
    assert re.match(pattern.removeprefix("re:"), "model.layers.0.mlp.gate")
    assert not re.match(pattern.removeprefix("re:"), "model.layers.0.mlp.gate_proj")
