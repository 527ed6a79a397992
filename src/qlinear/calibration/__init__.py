"""Statistics of the inputs of weights: `stats` defines them, `collect` gathers them, `stats_file` stores them."""
