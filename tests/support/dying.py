"""A job in a process of its own that is killed at a moment of our choosing."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  # the server imports once for all

import qlinear
from qlinear.checkpoint import output_dir as output
from qlinear.checkpoint.writer import ShardWriter
from qlinear.pipeline.output import journal

# Processes are forked from a clean server: none inherits this one's threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.dying"])


def killed(source: Path, out: Path, step: int, options: dict[str, Any], tensors: bool = False) -> bool:
    """Run a job that is killed (SIGKILL) at its step number `step`; whether it lived to that step.

    A step is a file that is renamed into its place; or, with `tensors`, a tensor that is half written.
    """
    process = _CONTEXT.Process(target=_run, args=(source, out, step, options, tensors))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == -signal.SIGKILL


def _run(source: Path, out: Path, step: int, options: dict[str, Any], tensors: bool) -> None:
    torch.set_num_threads(1)
    _die_at(step, tensors)
    qlinear.quantize(source, out, **options)


def _die_at(step: int, tensors: bool) -> None:
    steps = iter(range(step, -1, -1))

    def die_if_it_is_time() -> None:
        if next(steps) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if tensors:
        append = ShardWriter._append

        def half(self: ShardWriter, *args: Any) -> None:
            os.write(self._file, b"half of a tensor")
            die_if_it_is_time()
            os.ftruncate(self._file, os.lseek(self._file, -16, os.SEEK_END))
            append(self, *args)

        ShardWriter._append = half
        return
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        die_if_it_is_time()
        return rename(self, target)

    Path.rename = renamed


assert output.write_atomically is journal.write_atomically  # both rename, and so are steps
