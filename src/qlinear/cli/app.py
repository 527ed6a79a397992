"""The application that commands register with: its own options, and what it says before any of them runs."""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import QLinearError

# Commands that the processes of one torchrun share. The others run as one process.
_SHARED = ("quantize", "calibrate")

app = typer.Typer(
    name="qlinear",
    help="Quantizes the linear layers of transformer checkpoints, and says what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def print_version(wanted: bool) -> None:
    """Print the version and stop, where it was asked for."""
    if wanted:
        typer.echo(f"qlinear {version('qlinear')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and stop."),
]


@app.callback()
def require_one_process(context: typer.Context, version: Version = False) -> None:
    """Quantizes the linear layers of transformer checkpoints, and says what it cost."""
    if is_one_of_many() and context.invoked_subcommand not in _SHARED:
        raise QLinearError(f"{context.invoked_subcommand} runs as one process: start it without torchrun")


def is_one_of_many() -> bool:
    """Whether torchrun, or a launcher that sets its variables, started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"
