"""What came of each case, in words that a user can choose by, as JSON and as a Markdown table."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What the engine's errors mean: the first part of a message that fits decides.
_NO_KERNEL = (
    "Failed to find a kernel",
    "not implemented for",
    "MoE backend",
    "_C::static_scaled_fp8_quant",
    "No compressed-tensors compatible scheme",
)
_REFUSED = ("is not divisible by weight quantization block_n", "not supported for quantization method")


def row(case: Row, result: Row | None, ranks: int) -> Row:
    """A row of the table: what was served, where, and what came of it. result: None where we ourselves refused."""
    kind, scheme, layout = case["name"].split(".")
    made: Row = {"kind": kind, "scheme": scheme, "layout": layout, "ranks": ranks}
    if result is None:
        return made | {"status": "not offered", "why": case["refused"]}
    if "error" in result:
        return made | {"status": _status(result["error"]), "why": " ".join(result["error"].split())[:240]}
    difference = result["perplexity"] / case["perplexity"] - 1
    schemes = sorted({what for what in result["layers"].values() if "LinearMethod" in what or "MoE" in what})
    status = "runs as w4a16" if scheme == "w4a8" else "runs"
    return made | {
        "status": status, "perplexity": result["perplexity"], "own": case["perplexity"], "difference": difference,
        "layers": schemes,
    }  # fmt: skip


def _status(error: str) -> str:
    if any(part in error for part in _NO_KERNEL):
        return "no kernel on CPU"
    return "refused" if any(part in error for part in _REFUSED) else "fails"


def write(rows: Sequence[Row], folder: Path) -> None:
    """table.json and table.md in a folder."""
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "table.md").write_text("\n".join(markdown(rows)) + "\n")


def markdown(rows: Sequence[Row]) -> Iterable[str]:
    """One line for each kind, scheme and layout, with one rank and two side by side."""
    yield "| model | scheme | layout | one rank | two ranks |"
    yield "|---|---|---|---|---|"
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for each in rows:
        key = (each["kind"], each["scheme"], each["layout"])
        difference = f", {100 * each['difference']:+.3f}%" if "difference" in each else ""
        lines.setdefault(key, {})[each["ranks"]] = each["status"] + difference
    for key, cells in lines.items():
        yield f"| {' | '.join(key)} | {cells.get(1, '')} | {cells.get(2, '')} |"
