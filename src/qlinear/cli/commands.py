"""The command line as a process: it runs one command, and turns errors into one line and an exit status.

Exit status: 0 on success; 2 for a mistake in the arguments or the input; 1, with a traceback, for a failure of ours;
130 after Ctrl-C, which is what a shell reports for it.
"""

import ctypes
import os
import sys
import warnings

import typer

from ..errors import QLinearError
from . import make_commands, measure_commands  # noqa: F401  (importing them registers their commands)
from .app import app, is_one_of_many

_INTERRUPTED = 130
# glibc's M_MMAP_THRESHOLD, of malloc.h.
_MMAP_THRESHOLD = -3
# Allocations of this many bytes or more get pages of their own.
_OWN_PAGES = 4 << 20


def main() -> None:
    """Run the command line, and exit with its status."""
    # transformers reads this when it is first imported, which is later. A value from outside stays.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _separate_large_tensors()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        sys.exit(_run())


def _separate_large_tensors() -> None:
    """Give every large tensor pages of its own, and huge pages where the system has them.

    By default, glibc raises its threshold as large blocks are freed, and then keeps tensors on its heap. The
    calibration set's hidden states live long; on the heap they would pin the space of short-lived tensors around them.
    """
    # torch reads this at the first tensor. Fewer, larger pages cost fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option(_MMAP_THRESHOLD, _OWN_PAGES)


def _run() -> int:
    """Run a command, and return the exit status."""
    try:
        code = app(prog_name="qlinear", standalone_mode=False)
    except QLinearError as error:
        return _say(_message(error), 2)
    except typer.TyperException as error:
        return _say(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except OSError as error:
        return _say(f"{error.strerror or error}: {error.filename or 'reading or writing failed'}", 2)
    return _say("stopped; what is finished stays as it is", code) if code == _INTERRUPTED else code or 0


def _message(error: QLinearError) -> str:
    """The text of an error. Where every rank raised it, the first speaks for all."""
    rank = os.environ.get("RANK", "0") if is_one_of_many() else "0"
    if rank == "0":
        return str(error)
    return "" if error.known_to_all else f"rank {rank}: {error}"


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the arguments, and where their help is. Empty where the help has been shown already."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if message and context else message


def _say(message: str, code: int) -> int:
    if message:
        print(f"qlinear: {' '.join(message.split())}", file=sys.stderr)
    return code
