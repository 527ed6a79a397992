"""The command line: each command is a typed function that calls one public function and shows what it gave."""

import ctypes
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from ..errors import QLinearError
from .display import Bars, show_calibration, show_evaluation, show_inspection, show_result, show_verification

if TYPE_CHECKING:
    from ..runtime.distributed import Ranks

app = typer.Typer(
    name="qlinear",
    help="Quantizes the linear layers of transformer checkpoints, and says what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

# Commands that the processes of one torchrun share; the others are for one alone.
_SHARED = ("quantize", "calibrate")
# What a shell reports for a process that Ctrl-C ended.
_INTERRUPTED = 130
# glibc's M_MMAP_THRESHOLD, of malloc.h.
_MMAP_THRESHOLD = -3

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a Hub id, or `demo` (the embedded model).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Trust = Annotated[bool, typer.Option(help="Run the Python code that a checkpoint brings along.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]  # noqa: UP045
Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="What to compute in: float32, bfloat16 or float16. Default: the fastest that is as exact."
    ),
]

Device = Annotated[
    str,
    typer.Option(
        help="What to compute on: `cpu`, `cuda` (under torchrun, a GPU for each process) or `cuda:1`."
    ),
]


@app.callback()
def require_alone(context: typer.Context) -> None:
    """Quantizes the linear layers of transformer checkpoints, and says what it cost."""
    if _is_one_of_many() and context.invoked_subcommand not in _SHARED:
        raise QLinearError(f"{context.invoked_subcommand} runs as one process: start it without torchrun")


@app.command(
    epilog="""
Examples:

    qlinear quantize demo build/demo-w8a8

    qlinear quantize ./Llama-3.2-1B out --calibration mine.jsonl --samples 256

    qlinear quantize ./model out --scheme w4a16 --algorithm gptq --smooth auto --scheme-for '*.down_proj=w8a16'

    qlinear quantize ./model out --smooth off --ignore 're:.*down_proj' --ignore lm_head

    qlinear quantize ./model out --algorithm gptq --device cuda

    torchrun --nproc-per-node 2 -m qlinear quantize ./model out --algorithm gptq
"""
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    scheme: Annotated[str, typer.Option(help="What weights and activations become.")] = "w8a8",
    algorithm: Annotated[
        str, typer.Option(help="What makes codes of weights: `rtn`, `gptq`, `awq`.")
    ] = "rtn",
    smooth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="SmoothQuant's alpha in [0, 1], `auto` (searched for each group), or `off`. Default: 0.5; with "
            "`awq`, its own search."
        ),
    ] = None,
    migration_scale: Annotated[
        str,
        typer.Option(help="Which smoothing vectors stay with their layers: `unfolded`, `always`, `never`."),
    ] = "unfolded",
    format: Annotated[
        str, typer.Option(help="`compressed-tensors`, `lmdeploy`, `awq` or `qlinear`.")
    ] = "compressed-tensors",
    calibration: Annotated[
        str,
        typer.Option(help="Text: a .txt, .jsonl or .parquet file, a folder, a Hub id, `demo`, or `random`."),
    ] = "demo",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    stats: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="What `qlinear calibrate` wrote, instead of calibrating."),
    ] = None,
    ignore: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Linears to leave in float: a name, a glob or `re:…`. Repeatable. Default: the output head."
        ),
    ] = None,
    scheme_for: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="`PATTERN=SCHEME`: another scheme for some linears. Repeatable; the last match counts."
        ),
    ] = None,
    keep_worst: Annotated[int, typer.Option(min=0, help="Leave so many of the worst linears in float.")] = 0,
    refine: Annotated[
        int,
        typer.Option(
            min=0, help="Passes over the calibration text to tune each block's scales and gains. Try 2."
        ),
    ] = 0,
    propagate: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            help="Calibrate blocks with what the quantized ones before them give. Default: yes, but for `rtn`."
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the calibration sequences.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one shard: 5GB, 500MB.")] = "5GB",
    max_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Memory to stay within, 6GB: beyond it, the calibration set waits on the disk."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it will take: time, memory, disk.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint that is in OUT.")] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with an unfinished run into OUT, or start anew.")
    ] = True,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a smaller, faster checkpoint that vLLM, SGLang and transformers load."""
    from ..api.quantize import quantize as run

    with _processes() as ranks, Bars(quiet or not ranks.is_main) as bars:
        result = run(
            model, out, scheme, smooth=_alpha(smooth), migration_scale=cast(Any, migration_scale),
            algorithm=cast(Any, algorithm), propagate=propagate, scheme_for=_pairs(scheme_for),
            keep_worst=keep_worst, refine=refine, format=format, calibration=calibration, samples=samples,
            seq_len=seq_len, stats=stats, ignore=ignore, dtype=dtype, device=device, seed=seed,
            max_shard_size=_bytes(max_shard_size, "--max-shard-size"),
            max_memory=None if max_memory is None else _bytes(max_memory, "--max-memory"),
            plan=plan, overwrite=overwrite, resume=resume, trust_remote_code=trust_remote_code, revision=revision,
            progress=bars.update,
        )  # fmt: skip
    if ranks.is_main:
        _show(result, as_json, show_result)


@app.command(
    epilog="""
Examples:

    qlinear calibrate ./model stats.safetensors --calibration mine.jsonl

    qlinear calibrate ./model inputs_stats.pth --samples 256
"""
)
def calibrate(
    model: Model,
    stats: Annotated[
        Path, typer.Argument(help="The file to make: .safetensors, or .pth for LMDeploy's inputs_stats.pth.")
    ],
    calibration: Annotated[str, typer.Option(help="Text, as `quantize --calibration` takes it.")] = "demo",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Chooses the calibration sequences.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the statistics of every linear's input: absmax, absmean, min, max and mean of each channel."""
    from ..api.calibrate import write_statistics as run

    with _processes() as ranks, Bars(quiet or not ranks.is_main) as bars:
        done = run(
            model, stats, calibration=calibration, samples=samples, seq_len=seq_len, dtype=dtype, device=device,
            seed=seed, overwrite=overwrite, trust_remote_code=trust_remote_code, revision=revision,
            progress=bars.update,
        )  # fmt: skip
    if ranks.is_main:
        _show(done, as_json, show_calibration)


@app.command(
    epilog="""
Examples:

    qlinear evaluate build/demo-w8a8 --reference demo

    qlinear evaluate out --reference ./model --data held-out.txt --tokens 20000
"""
)
def evaluate(
    model: Model,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The original: adds KL divergence and top-1 agreement."),
    ] = None,
    data: Annotated[str, typer.Option(help="Text, as `quantize --calibration` takes it.")] = "demo",
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of it.")] = 16384,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, and how far a model's predictions are from a reference's."""
    from ..api.evaluate import evaluate as run

    with Bars(quiet) as bars:
        evaluation = run(
            model, reference, data=data, tokens=tokens, seq_len=seq_len, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, revision=revision, progress=bars.update,
        )  # fmt: skip
    _show(evaluation, as_json, show_evaluation)


@app.command(
    epilog="""
Examples:

    qlinear inspect build/demo-w8a8

    qlinear inspect ./config.json --scheme w8a8 --json

    qlinear inspect ./model --format lmdeploy --migration-scale always

    qlinear inspect --verify build/demo-w8a8
"""
)
def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, a Hub id, `demo`, or a config.json alone.")
    ],
    scheme: Annotated[str, typer.Option(help="What to plan for, where nothing is quantized yet.")] = "w8a8",
    format: Annotated[
        str, typer.Option(help="The layout to plan for: as for `quantize`.")
    ] = "compressed-tensors",
    migration_scale: Annotated[
        str,
        typer.Option(help="Which smoothing vectors to plan as kept: `unfolded`, `always`, `never`."),
    ] = "unfolded",
    ignore: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Linears to leave in float. Default: the output head."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only compare a finished folder with what was written to it.")
    ] = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List each linear: its shape, scheme, scales, bytes before and after, and where its smoothing lives."""
    if verify:
        _verify(model, as_json, quiet)
        return
    from ..api.inspect import inspect as run

    found = run(
        model, scheme, format=format, migration_scale=cast(Any, migration_scale), ignore=ignore,
        trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    _show(found, as_json, show_inspection)


@app.command(epilog="Example:\n\n    qlinear convert build/demo-w8a8 build/demo-lmdeploy --format lmdeploy")
def convert(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint's folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    format: Annotated[str, typer.Option(help="`compressed-tensors`, `lmdeploy`, `awq` or `qlinear`.")],
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint that is in OUT.")] = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint in another layout; no code is touched."""
    from ..api.convert import convert as run

    made = run(model, out, format, overwrite=overwrite, revision=revision)
    typer.echo(json.dumps({"out": str(made)}) if as_json else str(made))


@app.command(epilog="Example:\n\n    qlinear generate build/demo-w8a8 'The function returns'")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far.")] = 64,
    dtype: Dtype = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Let a model, quantized or not, continue a text: a quick look at what it says."""
    from ..api.generate import generate as run

    text = run(
        model,
        prompt,
        max_new_tokens,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    typer.echo(json.dumps({"prompt": prompt, "text": text}) if as_json else prompt + text)


def _is_one_of_many() -> bool:
    """Whether torchrun, or what sets its variables, started this process among others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def _processes() -> Iterator["Ranks"]:
    """Inside, this process is one of those that torchrun started, or alone."""
    from ..runtime.distributed import Ranks, torchrun_group

    with torchrun_group() if _is_one_of_many() else nullcontext(Ranks()) as ranks:
        yield ranks


def _verify(folder: str, as_json: bool, quiet: bool) -> None:
    from ..checkpoint.checksums import verify

    with Bars(quiet) as bars:
        found = verify(folder, bars.update)
    _show(found, as_json, show_verification)


def _show(value: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(value)))
    else:
        show(value)


def _pairs(texts: Sequence[str] | None) -> dict[str, str]:
    """`PATTERN=SCHEME` texts as a mapping; the last `=` parts them, for patterns may hold one."""
    pairs = [text.rpartition("=") for text in texts or ()]
    for pattern, _, scheme in pairs:
        if not pattern or not scheme:
            raise QLinearError(
                f"--scheme-for must be PATTERN=SCHEME, such as '*.down_proj=w8a16'; got {scheme!r}"
            )
    return {pattern: scheme for pattern, _, scheme in pairs}


def _alpha(text: str | None) -> Any:
    """None, `auto`, `off`, or the number that the text is; what is neither is refused by the function that gets it."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _bytes(text: str, option: str) -> int:
    """A size such as 5GB, 500MB or 1024 in bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.upper().rstrip("KMGB")
    unit = text.upper()[len(number) :]
    if unit not in units or not number.strip().replace(".", "", 1).isdigit():
        raise QLinearError(f"{option} must be a size such as 5GB or 500MB; got {text!r}")
    return int(float(number) * units[unit])


def main() -> None:
    """Run the command line: 0 on success, 2 with one line for a mistake in what was given, 1 for a failure of ours."""
    # Read when transformers is first imported, which is later; what is set outside is left as it is.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _allocate_apart()
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        sys.exit(_run())


def _allocate_apart() -> None:
    """Have every large tensor lie on pages of its own, large ones where the system has them.

    glibc would come to keep tensors on its heap, as the first are freed. There what lives long, the calibration set's
    hidden states, lies between what does not, and holds it.
    """
    # Read at the first tensor: fewer, larger pages cost fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option(_MMAP_THRESHOLD, 4 << 20)


def _run() -> int:
    """Run a command, and return what the process exits with."""
    try:
        code = app(standalone_mode=False)
    except QLinearError as error:
        return _say(_spoken(error), 2)
    except typer.TyperException as error:
        return _say(_usage(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except OSError as error:
        return _say(f"{error.strerror or error}: {error.filename or 'reading or writing failed'}", 2)
    return _say("stopped; what is finished stays as it is", code) if code == _INTERRUPTED else code or 0


def _spoken(error: QLinearError) -> str:
    """What to say of an error: one process speaks for all where all know."""
    rank = os.environ.get("RANK", "0") if _is_one_of_many() else "0"
    if rank == "0":
        return str(error)
    return "" if error.known_to_all else f"rank {rank}: {error}"


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the arguments, and where their help is; nothing where the help has been shown already."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path} --help" if message and context else message


def _say(message: str, code: int) -> int:
    if message:
        print(f"qlinear: {' '.join(message.split())}", file=sys.stderr)
    return code
