"""How fast the quantized layer is: against its own int8 product alone, against bfloat16, against torchao.

    python benchmarks/linear.py [--size 4096] [--rounds 30]

A model calls one layer after another, so no weight is in cache when its turn comes: every case here runs through a
ring of layers whose weights together are larger than the cache, once to settle and once on the clock. The cases take
turns within one run, so a slow moment of the machine meets all of them, and each figure is the lower quartile of its
rounds. Ratios are what to compare between machines.
"""

import argparse
import copy
import functools
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qlinear import ops
from qlinear.functional import prepack, quantized_linear
from qlinear.nn import QLinear, QRMSNorm
from qlinear.ops import onednn_product

# Calls that are timed together, one for each layer of a ring.
Case = list[Callable[[], object]]
# 16 MiB of codes each at 4096 × 4096: together more than the caches of the processors we know.
LAYERS = 4


def measure(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Milliseconds per call of each case: lower quartile over rounds."""
    return {name: statistics.quantiles(taken, n=4)[0] for name, taken in times_of(cases, rounds).items()}


def times_of(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per call of each case in each round; in a round, the cases take turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            ring(case)
            times[name].append(1000 * ring(case) / len(case))
    return times


def ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b: both of a pair see the same state of the machine."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def ring(case: Case) -> float:
    """Seconds that all calls of a case take."""
    started = time.perf_counter()
    for call in case:
        call()
    return time.perf_counter() - started


class Range:
    """Statistics of a standard normal input, for static activations."""

    def __init__(self, width: int) -> None:
        self.min, self.max = torch.full((width,), -4.0), torch.full((width,), 4.0)


def product_alone(layer: QLinear, codes: Tensor) -> Callable[[], object]:
    packed, scale = onednn_product.packed_once(layer.weight), layer.weight_scale.flatten()
    return lambda: onednn_product.product(codes, 128, packed, scale)


def torchao_dynamic(linear: nn.Linear) -> nn.Module | None:
    """torchao's dynamic int8 layer from the same weight, None where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    wrapped = nn.Sequential(linear)
    quantize_(wrapped, Int8DynamicActivationInt8WeightConfig())
    return wrapped


def on(x: object, modules: Iterable[Callable[[object], object]]) -> Case:
    """Each module called with x."""
    return [functools.partial(module, x) for module in modules]


def layers(size: int, rows: int) -> dict[str, Case]:
    torch.manual_seed(0)
    linears = [nn.Linear(size, size, dtype=torch.bfloat16) for _ in range(LAYERS)]
    x: Tensor = torch.randn(rows, size, dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    dynamic = [QLinear.from_float(linear, "w8a8") for linear in linears]
    static = [QLinear.from_float(linear, "w8a8-static", Range(size)) for linear in linears]
    cases: dict[str, Case] = {
        "int8 product alone": [product_alone(layer, codes) for layer in dynamic],
        "QLinear dynamic": on(x, dynamic),
        "QLinear static": on(x, static),
        "bf16 F.linear": on(x, linears),
    }
    others = [torchao_dynamic(copy.deepcopy(linear)) for linear in linears]
    if others[0] is not None:
        cases["torchao dynamic"] = on(x, others)
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


def table_of_four_bits(size: int, rounds: int) -> None:
    """4-bit weights in groups of 128, compared with dequantizing the whole weight on every call, and with float."""
    print(f"\n4-bit weights, K = N = {size}, bfloat16 in and out, milliseconds")
    torch.manual_seed(0)
    linears = [nn.Linear(size, size, dtype=torch.bfloat16) for _ in range(LAYERS)]
    single = [copy.deepcopy(linear).float() for linear in linears]
    w4a16, w4a8 = ([QLinear.from_float(linear, scheme) for linear in linears] for scheme in ("w4a16", "w4a8"))
    for rows in (1, 8, 32, 40, 41, 64, 128, 512):
        x = torch.randn(rows, size, dtype=torch.bfloat16)
        cases = {
            "QLinear w4a16": on(x, w4a16),
            "QLinear w4a8": on(x, w4a8),
            "dequantized": on(x, [layer._forward_plain for layer in w4a16]),
            "bf16 F.linear": on(x, linears),
            "fp32 F.linear": on(x.float(), single),
        }
        times = times_of(cases, max(4, rounds // 4))
        taken = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}
        if rows == 1:
            ratios = ("dequantized", "bf16 F.linear", "fp32 F.linear")
            print(
                "| M |" + "".join(f" {name} |" for name in taken) + "".join(f" {r} ÷ w4a16 |" for r in ratios)
            )
            print("|---" * (len(taken) + len(ratios) + 1) + "|")
        figures = [f" {milliseconds:.2f} |" for milliseconds in taken.values()]
        figures += [f" {ratio(times[name], times['QLinear w4a16']):.2f} |" for name in ratios]
        print(f"| {rows} |" + "".join(figures), flush=True)


def table_of_norms(size: int, rounds: int) -> None:
    """A norm, its quantization and the layer: apart, and as codes that pass from one to the next."""
    print(f"\nRMS norm and layer, K = N = {size}, bfloat16, milliseconds")
    print("| M | norm, QLinear | QRMSNorm, QLinear | saved | quantization alone |")
    print("|---" * 5 + "|")
    torch.manual_seed(0)
    linears = [nn.Linear(size, size, dtype=torch.bfloat16) for _ in range(LAYERS)]
    layers = [QLinear.from_float(linear, "w8a8") for linear in linears]
    norm = nn.RMSNorm(size, eps=1e-6, dtype=torch.bfloat16)
    fused = QRMSNorm.from_float(norm)
    for rows in (1, 8, 64, 512):
        x = torch.randn(rows, size, dtype=torch.bfloat16)
        taken = measure(_norm_cases(layers, norm, fused, x), rounds)
        saved = taken["apart"] - taken["fused"]
        figures = (taken["apart"], taken["fused"], saved, taken["quantization"])
        print(f"| {rows} |" + "".join(f" {figure:.3f} |" for figure in figures), flush=True)


def _norm_cases(layers: list[QLinear], norm: nn.Module, fused: nn.Module, x: Tensor) -> dict[str, Case]:
    return {
        "apart": [lambda layer=layer: layer(norm(x)) for layer in layers],
        "fused": [lambda layer=layer: layer(fused(x)) for layer in layers],
        "quantization": [lambda: ops.quantize_tokens(x, None)] * len(layers),
    }


def table_of_packing(size: int, rounds: int) -> None:
    """What `prepack` saves a call of `quantized_linear`."""
    print(f"\nquantized_linear, K = N = {size}, milliseconds")
    print("| M | packed on every call | prepacked |")
    print("|---|---|---|")
    weight = torch.randint(-128, 128, (size, size), dtype=torch.int8)
    packed = prepack(weight)
    for rows in (1, 64):
        codes = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
        cases: dict[str, Case] = {
            "plain": [lambda codes=codes: quantized_linear(codes, weight, x_scale=0.1, w_scale=0.1)],
            "packed": [lambda codes=codes: quantized_linear(codes, packed, x_scale=0.1, w_scale=0.1)],
        }
        taken = measure(cases, max(5, rounds // 4))
        print(f"| {rows} | {taken['plain']:.3f} | {taken['packed']:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"oneDNN's int8 product is {'exact' if onednn_product.is_exact() else 'not exact, so unused'} here")
    with torch.inference_mode():
        for table in (table_of_layers, table_of_four_bits, table_of_norms, table_of_packing):
            table(arguments.size, arguments.rounds)


if __name__ == "__main__":
    main()
