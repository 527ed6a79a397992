"""The quantization job: what happens to each block, in which order, and what is written."""
