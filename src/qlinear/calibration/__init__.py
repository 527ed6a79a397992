"""Statistics of what weights read, gathered while the calibration set passes."""
