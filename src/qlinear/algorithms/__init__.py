"""Algorithms that round weights, one file each: (weight, format) -> codes. Nothing downstream rounds again."""

from .rtn import round_to_nearest

__all__ = ["round_to_nearest"]
