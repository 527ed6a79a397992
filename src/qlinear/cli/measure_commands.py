"""The commands that look at a model, and write nothing: `evaluate`, `inspect` and `generate`."""

import json
from typing import Any, cast

import typer

from . import options as o
from .app import app
from .display import Bars, show, show_evaluation, show_inspection, show_verification


@app.command(
    epilog="""
Examples:

    qlinear evaluate build/demo-w8a8 --reference demo

    qlinear evaluate out --reference ./model --data held-out.txt --tokens 20000
"""
)
def evaluate(
    model: o.Model,
    reference: o.Reference = None,
    data: o.Data = "demo",
    tokens: o.Tokens = 16384,
    seq_len: o.SeqLen = 512,
    dtype: o.EvaluationDtype = "float32",
    device: o.Device = "cpu",
    trust_remote_code: o.Trust = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure perplexity, and how far a model's predictions are from a reference's."""
    from ..api.evaluate import evaluate as run

    with Bars(quiet) as bars:
        evaluation = run(
            model, reference, data=data, tokens=tokens, seq_len=seq_len, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, revision=revision, progress=bars.update,
        )  # fmt: skip
    show(evaluation, as_json, show_evaluation)


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
    model: o.ModelOrConfig,
    scheme: o.PlannedScheme = "w8a8",
    format: o.PlannedLayout = "compressed-tensors",
    migration_scale: o.Policy = "unfolded",
    ignore: o.Ignore = None,
    verify: o.OnlyVerify = False,
    trust_remote_code: o.Trust = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """List each linear: its shape, scheme, scales, bytes before and after, and where its smoothing lives."""
    if verify:
        _verify(model, as_json, quiet)
        return
    from ..api.inspect import inspect as run

    inspection = run(
        model, scheme, format=format, migration_scale=cast(Any, migration_scale), ignore=ignore,
        trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    show(inspection, as_json, show_inspection)


@app.command(epilog="Example:\n\n    qlinear generate build/demo-w8a8 'The function returns'")
def generate(
    model: o.Model,
    prompt: o.Prompt,
    max_new_tokens: o.NewTokens = 64,
    dtype: o.Dtype = None,
    device: o.Device = "cpu",
    trust_remote_code: o.Trust = False,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
) -> None:
    """Let a model, quantized or not, continue a text: a quick look at what it says."""
    from ..api.generate import generate as run

    text = run(
        model, prompt, max_new_tokens, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        revision=revision,
    )  # fmt: skip
    typer.echo(json.dumps({"prompt": prompt, "text": text}) if as_json else prompt + text)


def _verify(folder: str, as_json: bool, quiet: bool) -> None:
    from ..checkpoint.checksums import verify

    with Bars(quiet) as bars:
        verification = verify(folder, bars.update)
    show(verification, as_json, show_verification)
