"""What a number means: schemes, rounding, and how codes are packed."""
