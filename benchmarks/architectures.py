"""What smoothing makes of every causal language model class of transformers: a line for each, and the totals.

    python -m benchmarks.architectures [NAME ...]

Each class is a tiny random instance, smoothed in memory by the job's own `quantize_block` (benchmarks/sweep.py). The
columns: the relative difference of the smoothed model's logits; how many weights of its blocks fold, nn.Linears and
others (experts, Conv1D, raw parameters) apart; the error of the logits in W8A8 without smoothing, and with it; seconds.
"""

import sys
import time
import warnings

from benchmarks.small_models import CANNOT_BUILD
from benchmarks.sweep import CLASSES, Swept, sweep
from transformers.utils import logging


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print("| class | difference | linears | others | W8A8 | smoothed W8A8 | s |")
    print("|---|---|---|---|---|---|---|")
    swept: list[Swept] = []
    for name in names:
        began = time.monotonic()
        swept.append(sweep(name))
        print(_line(name, swept[-1], time.monotonic() - began), flush=True)
    linears = [sum(s.linears[i] for s in swept) for i in (0, 1)]
    others = [sum(s.others[i] for s in swept) for i in (0, 1)]
    compared = [(s.plain, s.smoothed) for s in swept if s.plain and s.smoothed]
    print(
        f"\n{len(swept)} classes. nn.Linear: {linears[0]} of {linears[1]} folded ({linears[0] / linears[1]:.1%}). "
        f"Others: {others[0]} of {others[1]}. W8A8 error of {len(compared)}: "
        f"{sum(p for p, _ in compared):.2f} in all without smoothing, {sum(s for _, s in compared):.2f} with; "
        f"no worse in {sum(s <= p for p, s in compared)}. "
        f"Largest difference of logits {max(s.difference for s in swept):.1e}."
    )


def _line(name: str, swept: Swept, seconds: float) -> str:
    errors = ("—" if e is None else f"{e:.4f}" for e in (swept.plain, swept.smoothed))
    counts = (f"{folded} / {count}" for folded, count in (swept.linears, swept.others))
    return (
        f"| {name} | {swept.difference:.0e} | {' | '.join(counts)} | {' | '.join(errors)} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(CLASSES.keys() - CANNOT_BUILD))
