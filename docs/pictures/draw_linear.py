"""Draws the pictures of docs/linear.md, as SVG, from the library's own answers.

    python docs/pictures/draw_linear.py

Shapes come from `scale_shape`, codes from `choose_qparams` and `quantize`: what the pictures show is what the code
does. Nothing is drawn at random, so drawing again gives the same files, which a test checks.
"""

from pathlib import Path

import torch

from qlinear.formats.rounding import choose_qparams, dequantize, quantize
from qlinear.formats.scheme import TensorFormat

HERE = Path(__file__).parent
INK, FAINT, WEIGHT, SCALE, INPUT = "#1f2933", "#9aa5b1", "#d9e8f6", "#f4a259", "#e3f1df"


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = INK) -> str:
    """A rectangle from its upper left corner."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str = INK) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", fill: str = INK) -> str:
    """Words at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole SVG file."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="sans-serif">\n<title>{title}</title>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def layer() -> str:
    """x, W and y with what is shared by a row: one token's scale, one output's scale."""
    parts = [
        rect(40, 90, 128, 60, INPUT), text(104, 80, "x (tokens, in)"), rect(40, 110, 128, 8, SCALE),
        text(104, 172, "one token, one scale", 11, fill=FAINT),
        text(196, 126, "×", 20),
        rect(230, 50, 128, 140, WEIGHT), text(294, 40, "W (out, in)"), rect(230, 140, 128, 8, SCALE),
        text(294, 212, "one output, one row, one scale", 11, fill=FAINT),
        text(376, 62, "T", 13), text(410, 126, "=", 20),
        rect(450, 90, 140, 60, "white"), text(520, 80, "y (tokens, out)"),
        rect(450, 110, 140, 8, "#fbe3cc", "none"), rect(536, 90, 8, 60, "#fbe3cc", "none"),
        rect(536, 110, 8, 8, SCALE),
        text(520, 172, "(Σ of code × code) · w_scale · x_scale", 11, fill=FAINT),
    ]  # fmt: skip
    return picture(630, 230, "y = x W transposed: a row of x meets a row of W", parts)


FORMATS = (
    ("per tensor", TensorFormat("int8", "tensor")),
    ("per channel", TensorFormat("int8", "channel")),
    ("per group of 128", TensorFormat("int8", "group", group_size=128)),
    ("per block 128×128", TensorFormat("int8", "block", block_size=(128, 128))),
)


def scales(out: int = 1024, width: int = 512) -> str:
    """A weight cut into the tiles that share a scale, for every granularity."""
    parts = []
    for index, (name, fmt) in enumerate(FORMATS):
        left, top, across, down = 30 + 170 * index, 60, 100.0, 200.0
        rows, columns = fmt.tile((out, width))
        parts += [text(left + 50, 30, name), rect(left, top, across, down, WEIGHT)]
        drawn = range(1, -(-out // max(rows, out // 40)))  # rows are too many to draw one by one
        step = down * max(rows, out // 40) / out
        parts += [line(left, top + i * step, left + across, top + i * step, FAINT) for i in drawn]
        cuts = range(1, -(-width // columns))
        parts += [line(left + i * across * columns / width, top, left + i * across * columns / width, top + down)
                  for i in cuts]  # fmt: skip
        parts.append(rect(left, top, across * columns / width, max(3.0, down * rows / out), SCALE))
        parts.append(text(left + 50, 285, str(tuple(fmt.scale_shape((out, width))))))
    parts.append(
        text(
            350,
            315,
            f"the scales of a ({out}, {width}) weight; orange: what one scale covers",
            12,
            fill=FAINT,
        )
    )
    return picture(700, 330, "Which weights share a scale", parts)


def zero_point() -> str:
    """4-bit codes of inputs between -0.5 and 3, with and without a zero point."""
    x = torch.tensor([-0.5, 3.0])
    parts = []
    for row, symmetric in enumerate((True, False)):
        fmt, top = TensorFormat("int4", "tensor", symmetric=symmetric), 70 + 110 * row
        scale, zero = choose_qparams(x, fmt)
        low, high = fmt.code_range
        codes = torch.arange(int(low), int(high) + 1)
        values = dequantize(codes, scale, zero, fmt).tolist()
        used = {int(code) for code in quantize(torch.linspace(-0.5, 3, 200), scale, zero, fmt)}
        name = "symmetric" if symmetric else f"asymmetric, zero point {int(zero or 0)}"
        parts.append(text(20, top - 28, f"{name}: step {float(scale):.2f}", 13, "start"))
        parts += [line(20, top, 680, top, FAINT), rect(_at(-0.5), top - 4, _at(3) - _at(-0.5), 8, INPUT)]
        for code, value in zip(codes.tolist(), values, strict=True):
            shade = SCALE if code in used else "white"
            parts.append(f'<circle cx="{_at(value):.1f}" cy="{top}" r="7" fill="{shade}" stroke="{INK}"/>')
            parts.append(text(_at(value), top + 24, str(code), 10))
    parts.append(
        text(350, 250, "green: the inputs, -0.5 to 3; orange: the codes that they use", 12, fill=FAINT)
    )
    return picture(700, 265, "What a zero point is for", parts)


def _at(value: float) -> float:
    return 350 + 95 * (value - 0.1)


def static_or_dynamic() -> str:
    """The rounding error of tokens of growing size: a scale of their own, or one for all."""
    sizes = [2.0**power for power in range(-4, 3)]
    wave = torch.linspace(-1, 1, 101)
    tokens = torch.stack([wave * size for size in sizes])
    static, dynamic = TensorFormat("int8", "tensor"), TensorFormat("int8", "token", dynamic=True)
    parts = [line(60, 200, 660, 200), line(60, 30, 60, 200), text(20, 20, "relative error, %", 12, "start")]
    for fmt, colour, name, left in (
        (static, INK, "static: one scale for all", -18),
        (dynamic, SCALE, "dynamic", 4),
    ):
        scale, zero = choose_qparams(tokens, fmt)
        off = dequantize(quantize(tokens, scale, zero, fmt), scale, zero, fmt) - tokens
        for index, share in enumerate((100 * off.norm(dim=1) / tokens.norm(dim=1)).tolist()):
            x, height = 110 + 82 * index + left, 6.0 * share
            parts.append(rect(x, 200 - height, 16, height, colour, "none"))
            parts.append(text(x + 8, 194 - height, f"{share:.1f}", 9))
        parts.append(text(640, 40 if fmt is static else 60, name, 12, "end", colour))
    parts += [text(110 + 82 * i, 218, f"{size:g}", 11) for i, size in enumerate(sizes)]
    parts.append(text(360, 240, "largest input of the token", 12, fill=FAINT))
    return picture(700, 250, "What a scale per token buys", parts)


PICTURES = {
    "layer.svg": layer,
    "scales.svg": scales,
    "zero-point.svg": zero_point,
    "static-dynamic.svg": static_or_dynamic,
}


def main() -> None:
    """Write every picture beside this script."""
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())


if __name__ == "__main__":
    main()
