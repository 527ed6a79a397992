"""Formats and schemes: what they refuse, and the shape of their scales."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlinear.errors import SchemeError
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat, get_scheme

SIZES = st.integers(1, 2000)


def test_the_scales_of_a_1024_by_512_weight_are_those_of_the_specification() -> None:
    shape = (1024, 512)
    assert TensorFormat("int8", "tensor").scale_shape(shape) == (1,)
    assert TensorFormat("int8", "channel").scale_shape(shape) == (1024, 1)
    assert TensorFormat("int4", "group", group_size=128).scale_shape(shape) == (1024, 4)
    assert TensorFormat("float8_e4m3fn", "block", block_size=(128, 128)).scale_shape(shape) == (8, 4)
    assert TensorFormat("int8", "token", dynamic=True).scale_shape((3, 5, 512)) == (3, 5, 1)


@given(rows=SIZES, columns=SIZES, height=st.integers(1, 300), width=st.integers(1, 300))
def test_blocks_cover_a_weight_of_any_shape(rows: int, columns: int, height: int, width: int) -> None:
    down, across = TensorFormat("int8", "block", block_size=(height, width)).scale_shape((rows, columns))
    assert (down - 1) * height < rows <= down * height
    assert (across - 1) * width < columns <= across * width


@given(rows=SIZES, columns=SIZES, group=st.integers(1, 300))
def test_a_group_divides_the_input_or_is_refused(rows: int, columns: int, group: int) -> None:
    fmt = TensorFormat("int4", "group", group_size=group)
    if columns % group:
        with pytest.raises(
            SchemeError, match=f"in_features {columns} .* not divisible by group_size {group}"
        ):
            fmt.scale_shape((rows, columns))
    else:
        assert fmt.scale_shape((rows, columns)) == (rows, columns // group)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"granularity": "group"}, "group_size goes with granularity 'group'"),
        ({"granularity": "channel", "group_size": 8}, "group_size goes with granularity 'group'"),
        ({"granularity": "group", "group_size": 0}, "group_size must be at least 1"),
        ({"granularity": "block"}, "block_size goes with granularity 'block'"),
        ({"dtype": "uint8"}, "uint8 codes need a zero point"),
        ({"dtype": "float8_e5m2", "symmetric": False}, "float8_e5m2 codes have no zero point"),
    ],
)
def test_a_format_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        TensorFormat(**arguments)  # type: ignore[arg-type]


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemeError, match=r"one of .*w8a8.*; got 'w9'"):
        get_scheme("w9")


@pytest.mark.parametrize("name", SCHEMES)
def test_a_preset_is_found_by_its_name_and_a_scheme_is_itself(name: str) -> None:
    assert get_scheme(name) is SCHEMES[name]
    assert SCHEMES[name].name == name
    own = Scheme("own", TensorFormat("int8", "tensor"))
    assert get_scheme(own) is own


@pytest.mark.parametrize(("name", "size"), [("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)])
def test_formats_with_stored_scales_have_one_a_group(name: str, size: int) -> None:
    scheme = get_scheme(name)
    assert scheme.weight.scale_shape((1024, 512)) == (1024, 512 // size)
    assert scheme.activation is not None
    assert scheme.activation.scale_shape((2, 7, 512)) == (2, 7, 512 // size)
    assert scheme.is_static == (name == "nvfp4")
    with pytest.raises(SchemeError, match=f"not divisible by group_size {size}"):
        scheme.weight.scale_shape((8, 40))
