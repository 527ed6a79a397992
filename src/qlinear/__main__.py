"""`python -m qlinear`, which torchrun starts."""

from .cli.commands import main

main()
