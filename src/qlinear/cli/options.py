"""The options that commands take, each with its help; and the texts among them as values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import QLinearError
from ..formats.scheme import SCHEMES

_LAYOUTS = ("compressed-tensors", "lmdeploy", "awq", "qlinear")
_ALGORITHMS = ("rtn", "gptq", "awq")
_POLICIES = ("unfolded", "always", "never")
_DTYPES = ("float32", "bfloat16", "float16")


def _one_of(values: Sequence[str], **about: Any) -> Any:
    """An option whose values a shell completes. What is none of them is refused by the function that gets it."""
    return typer.Option(autocompletion=lambda: list(values), **about)


# --- what is read and written ---

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or `demo` (the embedded model).")]
ModelOrConfig = Annotated[
    str, typer.Argument(help="A checkpoint folder, a Hub id, `demo`, or a config.json alone.")
]
QuantizedModel = Annotated[str, typer.Argument(help="A quantized checkpoint's folder or Hub id.")]
Out = Annotated[Path, typer.Argument(help="The folder to make.")]
StatsOut = Annotated[
    Path, typer.Argument(help="The file to make: .safetensors, or .pth for LMDeploy's inputs_stats.pth.")
]
Prompt = Annotated[str, typer.Argument(help="The text to continue.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the checkpoint that is in OUT.")]
OverwriteFile = Annotated[bool, typer.Option(help="Replace the file if it exists.")]
Resume = Annotated[bool, typer.Option(help="Go on with an unfinished run into OUT, or start anew.")]
ShardSize = Annotated[str, typer.Option(help="Bytes of one shard: 5GB, 500MB.")]
Trust = Annotated[bool, typer.Option(help="Run the Python code that a checkpoint brings along.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]  # noqa: UP045

# --- what becomes of the weights ---

SchemeName = Annotated[str, _one_of(sorted(SCHEMES), help="The formats of weights and activations.")]
PlannedScheme = Annotated[
    str, _one_of(sorted(SCHEMES), help="The scheme to plan for, where nothing is quantized yet.")
]
AlgorithmName = Annotated[
    str, _one_of(_ALGORITHMS, help="What chooses the codes of weights: `rtn`, `gptq`, `awq`.")
]
Smooth = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="SmoothQuant's alpha in [0, 1], `auto` (searched for each group), or `off`. Default: 0.5; with "
        "`awq`, its own search."
    ),
]
Policy = Annotated[
    str,
    _one_of(_POLICIES, help="Which smoothing vectors stay with their layers: `unfolded`, `always`, `never`."),
]
LayoutName = Annotated[str, _one_of(_LAYOUTS, help="`compressed-tensors`, `lmdeploy`, `awq` or `qlinear`.")]
PlannedLayout = Annotated[str, _one_of(_LAYOUTS, help="The layout to plan for: as for `quantize`.")]
Ignore = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="Linears to leave in float: a name, a glob or `re:…`. Repeatable. Default: the output head."
    ),
]
SchemeFor = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="`PATTERN=SCHEME`: another scheme for some linears. Repeatable; the last match counts."
    ),
]
KeepWorst = Annotated[int, typer.Option(min=0, help="Leave so many of the worst linears in float.")]
Refine = Annotated[
    int,
    typer.Option(
        min=0, help="Passes over the calibration text to tune each block's scales and gains. Try 2."
    ),
]
Propagate = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        help="Calibrate blocks with what the quantized ones before them give. Default: yes, but for `rtn`."
    ),
]

# --- text ---

Calibration = Annotated[
    str,
    typer.Option(help="Text: a .txt, .jsonl or .parquet file, a folder, a Hub id, `demo`, or `random`."),
]
Data = Annotated[str, typer.Option(help="Text, as `quantize --calibration` takes it.")]
Samples = Annotated[int, typer.Option(min=1, help="Sequences of calibration text.")]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
Tokens = Annotated[int, typer.Option(min=2, help="How many tokens of it.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens to add.")]
Seed = Annotated[int, typer.Option(help="Chooses the calibration sequences.")]
StatsIn = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="What `qlinear calibrate` wrote, instead of calibrating."),
]
Reference = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="The original: adds KL divergence and top-1 agreement."),
]

# --- how it is computed, and shown ---

Dtype = Annotated[
    Optional[str],  # noqa: UP045
    _one_of(
        _DTYPES,
        help="What to compute in: float32, bfloat16 or float16. Default: the fastest that is as exact.",
    ),
]
EvaluationDtype = Annotated[
    str,
    _one_of(
        _DTYPES,
        help="What both models compute in: float32, bfloat16 or float16. float32 prints the same on every processor.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="What to compute on: `cpu`, `cuda` (under torchrun, a GPU for each process) or `cuda:1`."
    ),
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Memory to stay within, 6GB: beyond it, the calibration set waits on the disk."),
]
OnlyPlan = Annotated[bool, typer.Option("--plan", help="Only say what it will take: time, memory, disk.")]
OnlyVerify = Annotated[
    bool, typer.Option("--verify", help="Only compare a finished folder with what was written to it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


def parse_rules(texts: Sequence[str] | None) -> dict[str, str]:
    """`PATTERN=SCHEME` texts as a mapping. The last `=` separates the two, for patterns may hold one."""
    rules = [text.rpartition("=") for text in texts or ()]
    for pattern, _, scheme in rules:
        if not pattern or not scheme:
            raise QLinearError(
                f"--scheme-for must be PATTERN=SCHEME, such as '*.down_proj=w8a16'; got {scheme!r}"
            )
    return {pattern: scheme for pattern, _, scheme in rules}


def parse_alpha(text: str | None) -> Any:
    """The text as a number, where it is one. `auto`, `off` and mistakes pass; the function that gets them checks."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def parse_bytes(text: str, option: str) -> int:
    """A size such as 5GB, 500MB or 1024 in bytes. Raises QLinearError, naming the option."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.upper().rstrip("KMGB")
    unit = text.upper()[len(number) :]
    if unit not in units or not number.strip().replace(".", "", 1).isdigit():
        raise QLinearError(f"{option} must be a size such as 5GB or 500MB; got {text!r}")
    return int(float(number) * units[unit])
