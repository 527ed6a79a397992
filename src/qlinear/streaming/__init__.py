"""A checkpoint as a model whose blocks are in memory one at a time: built on meta, loaded by part, paused at blocks."""
