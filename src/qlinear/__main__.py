"""`python -m qlinear`, which torchrun starts."""

from .cli import main

main()
