"""How fast the quantized layer is: against its own int8 product alone, against bfloat16, against torchao.

    python benchmarks/linear.py [--size 4096] [--rounds 30]

All rows of a table are measured in turns within one run, so a slow moment of the machine meets all of them, and
each figure is the lower quartile of its rounds. Ratios are what to compare between machines.
"""

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlinear.nn import QLinear
from qlinear.ops import cpu

Case = Callable[[], object]


def measure(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Milliseconds of each case: lower quartile over rounds in which each ran once."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.quantiles(taken, n=4)[0] for name, taken in times.items()}


class Range:
    """Statistics of a standard normal input, for static activations."""

    def __init__(self, width: int) -> None:
        self.min, self.max = torch.full((width,), -4.0), torch.full((width,), 4.0)


def product_alone(layer: QLinear, rows: int) -> Case:
    codes = torch.randint(0, 256, (rows, layer.in_features), dtype=torch.uint8)
    packed, scale = cpu.packed_once(layer.weight), layer.weight_scale.flatten()
    return lambda: cpu._product(codes, 128, packed, scale)


def torchao_dynamic(linear: nn.Linear) -> nn.Module | None:
    """torchao's dynamic int8 layer from the same weight, None where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    wrapped = nn.Sequential(linear)
    quantize_(wrapped, Int8DynamicActivationInt8WeightConfig())
    return wrapped


def layers(size: int, rows: int) -> dict[str, Case]:
    torch.manual_seed(0)
    linear = nn.Linear(size, size, dtype=torch.bfloat16)
    x: Tensor = torch.randn(rows, size, dtype=torch.bfloat16)
    dynamic = QLinear.from_float(linear, "w8a8")
    static = QLinear.from_float(linear, "w8a8-static", Range(size))
    cases: dict[str, Case] = {
        "int8 product alone": product_alone(dynamic, rows),
        "QLinear dynamic": lambda: dynamic(x),
        "QLinear static": lambda: static(x),
        "bf16 F.linear": lambda: linear(x),
    }
    other = torchao_dynamic(nn.Linear(size, size, dtype=torch.bfloat16))
    if other is not None:
        cases["torchao dynamic"] = lambda: other(x)
    return cases


def table_of_layers(size: int, rounds: int) -> None:
    print(f"\nOne layer, K = N = {size}, bfloat16 in and out, milliseconds")
    for rows in (1, 8, 64, 512):
        cases = layers(size, rows)
        taken = measure(cases, rounds)
        if rows == 1:
            print("| M |" + "".join(f" {name} |" for name in taken) + " dynamic ÷ product | bf16 ÷ dynamic |")
            print("|---" * (len(taken) + 3) + "|")
        figures = "".join(f" {milliseconds:.3f} |" for milliseconds in taken.values())
        overhead = taken["QLinear dynamic"] / taken["int8 product alone"]
        speedup = taken["bf16 F.linear"] / taken["QLinear dynamic"]
        print(f"| {rows} |{figures} {overhead:.2f} | {speedup:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"oneDNN's int8 product is {'exact' if cpu.is_exact() else 'not exact, so unused'} here")
    with torch.inference_mode():
        table_of_layers(arguments.size, arguments.rounds)


if __name__ == "__main__":
    main()
