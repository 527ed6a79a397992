"""Checks of compressed-tensors' QuantizationArgs, as a config.json holds them.

A value of the wrong type would reach the ops, which refuse it in words that do not name the file.
"""

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError

# What compressed-tensors takes for each argument that decides how codes are read; None stands for its default.
_TYPES: dict[str, tuple[type, ...]] = {
    "num_bits": (int,), "type": (str,), "strategy": (str,), "symmetric": (bool,), "dynamic": (bool, str),
    "group_size": (int,), "block_structure": (list, tuple, str),
}  # fmt: skip


def require_types(args: object) -> None:
    """Raise CheckpointError unless the arguments are an object whose values have the types that they must have."""
    if not isinstance(args, Mapping):
        raise CheckpointError(
            f"quantization_config has the arguments {args!r}, which must be an object: download config.json again"
        )
    for key, kinds in _TYPES.items():
        value = args.get(key)
        is_bool = isinstance(value, bool) and bool not in kinds
        if value is not None and (is_bool or not isinstance(value, kinds)):
            raise _refused(key, value, f"of type {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(dynamic := args.get("dynamic"), str) and dynamic.lower() != "local":
        raise _refused("dynamic", dynamic, 'true, false or "local"')


def read_block(value: Any) -> tuple[int, int] | None:
    """The (out, in) of a tile; older files have a string such as "128x128". Raises CheckpointError for others."""
    if value is None:
        return None
    sizes = (
        [int(size) if size.isdecimal() else 0 for size in value.split("x")]
        if isinstance(value, str)
        else value
    )
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise _refused("block_structure", value, "two integers of at least 1")
    return sizes[0], sizes[1]


def _refused(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(
        f"quantization_config has {key} {value!r}, which must be {allowed}: download config.json again"
    )
