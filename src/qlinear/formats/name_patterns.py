"""Patterns of module names, by which a user says what a scheme is for: one language in every room.

A pattern is a name (`lm_head`), a glob (`*.down_proj`), or `re:` and a regular expression that matches from the start
of the name, as in compressed-tensors' configs.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..errors import SchemeError


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means the module of this name. Raises SchemeError for a damaged regular expression."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise SchemeError(f"{pattern!r} is no regular expression: {error}") from None
    return name == pattern or fnmatchcase(name, pattern)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns means the module of this name."""
    return any(matches(pattern, name) for pattern in patterns)
