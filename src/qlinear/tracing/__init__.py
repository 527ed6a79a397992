"""Finds which weights of a block share an input, and which norm or linear produces that input.

In this order: `trace` records every product of an activation with a weight; `experiment` runs the block with one
producer scaled; `find_folds` reads off which inputs changed; `proof` runs the block with and without each fold and
keeps the folds that change nothing; `folds` holds the results. `on_meta` does the same for a model without weights.

Everything is found by running the block, so there is no table of architectures or of parameter names.
"""
