"""Which linears are chosen, and how large the result will be."""

from pathlib import Path

import pytest
from torch import nn

import qlinear
from qlinear.errors import QLinearError, SchemeError
from qlinear.formats.scheme import Scheme, TensorFormat, get_scheme
from qlinear.pipeline.select_layers import make_plan, quantizable
from qlinear.streaming.open_model import open_model

from ..support.models import save_model

W8A8 = get_scheme("w8a8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


def test_the_head_stays_in_float_unless_something_else_is_ignored(folder: Path) -> None:
    source = open_model(folder)
    linears = {name for name, _ in quantizable(source)}
    assert make_plan(source, W8A8, None).chosen == linears - {"lm_head"}
    assert make_plan(source, W8A8, []).chosen == linears
    assert make_plan(source, W8A8, ["*.o_proj"]).chosen == {n for n in linears if not n.endswith("o_proj")}


def test_chosen_and_ignored_are_all_linears_and_never_both(folder: Path) -> None:
    source = open_model(folder)
    plan = make_plan(source, W8A8, ["*.mlp.*", "lm_head"])
    assert not plan.chosen & set(plan.ignored)
    assert plan.chosen | set(plan.ignored) == {name for name, _ in quantizable(source)}


def test_without_a_scheme_nothing_is_chosen_and_nothing_shrinks(folder: Path) -> None:
    source = open_model(folder)
    plan = make_plan(source, None, None)
    assert (plan.chosen, plan.nbytes) == (frozenset(), source.checkpoint.nbytes)


def test_what_a_group_size_does_not_divide_is_named_with_the_way_out(folder: Path) -> None:
    scheme = Scheme("w4a16-g16", TensorFormat("int4", "group", group_size=16))
    with pytest.raises(SchemeError, match=r"group_size 16.*--ignore model\.layers\.0\."):
        make_plan(open_model(folder), scheme, None)


def test_a_tied_head_costs_its_codes_and_takes_nothing_away(tmp_path: Path) -> None:
    source = open_model(save_model(tmp_path / "tied", tie_word_embeddings=True))
    with_head, without = (make_plan(source, W8A8, ignore) for ignore in ([], None))
    # Codes (97, 30) and a float32 scale for each of 97 rows; the float embedding is still there.
    assert with_head.nbytes - without.nbytes == 97 * 30 + 97 * 4


def test_a_vision_tower_is_left_as_it_is_and_engines_are_told(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        "vocab_size": 97,
        "hidden_size": 30,
        "intermediate_size": 44,
        "head_dim": 10,
    }
    few = {"num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {"hidden_size": 12, "intermediate_size": 20, "image_size": 28, "patch_size": 14}
    folder = save_model(
        tmp_path / "seeing",
        "gemma3",
        text_config=text | few | {"num_key_value_heads": 1},
        vision_config=vision | few,
        mm_tokens_per_image=4,
    )
    source = open_model(folder)
    plan = make_plan(source, W8A8, None)
    assert len(plan.chosen) == 14
    assert all("language_model" in name for name in plan.chosen)
    seeing = {n for n, m in source.model.named_modules() if isinstance(m, nn.Linear) and "vision" in n}
    assert seeing
    assert seeing <= set(plan.ignored)


def test_groups_of_an_input_that_do_not_divide_it_are_refused_by_name(tmp_path: Path) -> None:
    source = save_model(
        tmp_path / "model", hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=16
    )
    for work in (
        lambda: qlinear.quantize(source, tmp_path / "out", "fp8-block"),
        lambda: qlinear.inspect(source, "fp8-block"),
    ):
        with pytest.raises(QLinearError, match=r"gate_proj: in_features 64 is not divisible by 128.*=fp8"):
            work()
    assert not (tmp_path / "out").exists()


def test_a_scheme_for_the_head_is_done_though_heads_stay_in_float_by_default(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    result = qlinear.quantize(source, tmp_path / "out", smooth="off", scheme_for={"lm_head": "w8a16"})
    assert {layer.name: layer.scheme for layer in result.layers}["lm_head"] == "w8a16"
    every = qlinear.quantize(source, tmp_path / "all", smooth="off", scheme_for={"*": "w8a16"})
    assert "lm_head" not in {layer.name for layer in every.layers}
