"""Who feeds whom in a block, found by running it and proved: no table of architectures, no names."""
