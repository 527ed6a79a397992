"""Arguments of a quantization config are taken as compressed-tensors takes them, or refused by name."""

from typing import Any

import pytest

from qlinear.checkpoint.layouts.compressed_tensors_args import read_block, require_types
from qlinear.errors import CheckpointError

_ARGS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("symmetric", "int8", "of type bool"),
        ("symmetric", 1, "of type bool"),
        ("num_bits", True, "of type int"),
        ("num_bits", [1], "of type int"),
        ("type", {}, "of type str"),
        ("group_size", "32", "of type int"),
        ("dynamic", 1, "of type bool or str"),
        ("dynamic", "model", 'true, false or "local"'),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_types(_ARGS | {key: value})
    assert f"{key} {value!r}, which must be {allowed}" in str(caught.value)


@pytest.mark.parametrize("args", ["int8", [1], 3, True])
def test_arguments_that_are_no_object_are_refused(args: Any) -> None:
    with pytest.raises(CheckpointError, match="must be an object"):
        require_types(args)


@pytest.mark.parametrize("value", [None, [128, 64], (128, 64), "128x64"])
def test_a_tile_is_a_pair_or_a_string(value: Any) -> None:
    assert read_block(value) == (None if value is None else (128, 64))


@pytest.mark.parametrize(
    "value", [[1], [1, 2, 3], ["a", 1], [0, 0], [-1, 8], [16.0, 16], [True, 1], "x", "128", ""]
)
def test_a_tile_of_anything_but_two_sizes_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"block_structure .* must be two integers of at least 1"):
        read_block(value)
