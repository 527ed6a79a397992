"""SmoothQuant's statistics and vector, under the public name `qlinear.smooth`."""

from .algorithms.smoothquant import smoothing_scale, weight_statistic

__all__ = ["smoothing_scale", "weight_statistic"]
