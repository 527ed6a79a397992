"""Peers run in environments of their own, which are made if they are missing, and each by a script in `peers/`."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LLMCOMPRESSOR = ("torch==2.13.0", "llmcompressor==0.14.0.1")
AUTOROUND = ("torch==2.13.0", "auto-round==0.16.1")
SCRIPTS = Path(__file__).absolute().parent / "peers"


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment with these packages."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run_peer(python: Path, script: str, model: Path, ids: Path, out: Path, *options: str) -> float:
    """Have a peer make the checkpoint `out`, with its log beside it; the seconds it took.

    ids: a safetensors file of calibration tokens. Raises RuntimeError with the peer's reason.
    """
    print(f"running {script} for {out.name}", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    command = [python, SCRIPTS / script, model.absolute(), ids.absolute(), out.absolute(), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    out.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        # The first of a chain of tracebacks says what went wrong before anybody wrapped it.
        errors = (line for line in done.stderr.splitlines() if line.partition(":")[0].endswith("Error"))
        raise RuntimeError(next(errors, done.stderr[-300:]))
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])
