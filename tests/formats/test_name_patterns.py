"""One language of patterns: names, globs and regular expressions, the same wherever layers are named."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qlinear import quantize_
from qlinear.errors import SchemeError
from qlinear.formats.name_patterns import matches, matches_any
from qlinear.nn import QLinear

NAMES = st.lists(st.text(string.ascii_lowercase + string.digits + "_", min_size=1), min_size=1).map(".".join)


@given(NAMES)
def test_a_name_matches_itself_by_any_kind_of_pattern(name: str) -> None:
    assert all(matches(pattern, name) for pattern in (name, "*", f"*{name[-1]}", "re:.*", f"re:{name[0]}"))


@given(NAMES, NAMES)
def test_a_plain_name_matches_no_other(a: str, b: str) -> None:
    assert matches(a, b) == (a == b)


@given(NAMES)
def test_a_regular_expression_matches_from_the_start(name: str) -> None:
    assert not matches(f"re:{name}", f"!{name}")
    assert matches(f"re:{name}", f"{name}!")


def test_any_of_several_patterns_is_enough_and_none_is_not() -> None:
    assert matches_any(["no", "*.b"], "a.b")
    assert not matches_any([], "a.b")


def test_a_damaged_regular_expression_is_named() -> None:
    with pytest.raises(SchemeError, match=r"'re:\(' is no regular expression"):
        matches("re:(", "name")


@pytest.mark.parametrize("pattern", ["up", "u*", "re:u"])
def test_quantize_in_place_speaks_the_same_language(pattern: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
    assert quantize_(model, "w8a8", ignore=[pattern]).replaced == ("down",)
    assert isinstance(model["down"], QLinear)
