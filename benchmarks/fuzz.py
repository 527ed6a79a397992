"""Damaged input of every kind: each case must be done, or be refused by a QLinearError in one line that leaves nothing.

    python -m benchmarks.fuzz [COUNT] [FIRST]

Case n is decided by n alone: a checkpoint (float, sharded, of experts, or quantized), a file of it or the calibration
text, a change to that file, and a command. So a run goes on with FIRST, and `python -m benchmarks.fuzz 1 n` repeats a
case. The numbers of those that fail are printed with what happened. A child process does the work, so that a crash of
the interpreter is one failed case as well.
"""

import contextlib
import copy
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import qlinear

# Seconds after which a case counts as hanging.
LIMIT = 60
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1}
IDS = torch.arange(3, 35).view(2, 16)
ODD = (
    None, True, -1, 0, 1, 3, 2**31, 10**30, 0.5, float("nan"),
    "", "x", "../x", "\ud800", [], [1], {}, {"a": 1}, "int8", "model",
)  # fmt: skip
TEXT = [
    {"text": "w3 w4 w5 " * 20}, {"messages": [{"role": "user", "content": "w6 " * 40}]},
    {"instruction": "w7 " * 20, "output": "w8 " * 20}, {"conversations": [{"from": "human", "value": "w9 " * 30}]},
]  # fmt: skip


def prepare(folder: Path) -> list[Path]:
    """Write the checkpoints that are damaged, into sub-folders."""
    plain = _save(folder / "plain", "llama")
    sharded = _save(folder / "sharded", "llama", shard=20_000)
    experts = _save(folder / "experts", "qwen3_moe", **EXPERTS)
    made = [
        ("w8a8", "compressed-tensors"),
        ("w4a16-g32", "compressed-tensors"),
        ("w8a8", "lmdeploy"),
        ("w8a8", "qlinear"),
    ]
    quantized = [folder / f"{scheme}-{layout}" for scheme, layout in made]
    for out, (scheme, layout) in zip(quantized, made, strict=True):
        qlinear.quantize(plain, out, scheme, format=layout, smooth="off")
    return [plain, sharded, experts, *quantized]


def _save(folder: Path, kind: str, shard: int = 10**9, **options: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | options)))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def run_case(number: int, bases: list[Path]) -> str | None:
    """Do a case; what was wrong, or None."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(draw.choice(bases), Path(scratch) / "source")
        (Path(scratch) / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXT))
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()] + [
            Path(scratch) / "text.jsonl"
        ]
        for file in draw.sample(files, draw.choice((1, 1, 1, 2))):
            damage(file, draw)
        out = Path(scratch) / "out"
        name = draw.choice(list(COMMANDS))
        try:
            with _time_limit():
                COMMANDS[name](folder, out, Path(scratch) / "text.jsonl")
        except qlinear.QLinearError as error:
            if "\n" in str(error):
                return f"{name}: several lines: {error}"
            return f"{name}: left {sorted(p.name for p in out.iterdir())}" if out.exists() else None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in place if "qlinear" in f.filename]
            return f"{name}: {type(error).__name__} at {' '.join(ours[-3:])}: {' '.join(str(error).split())[:200]}"
    return None


COMMANDS: dict[str, Callable[[Path, Path, Path], object]] = {
    "inspect": lambda model, out, text: qlinear.inspect(model),
    "load": lambda model, out, text: qlinear.load(model),
    "quantize": lambda model, out, text: qlinear.quantize(model, out, smooth="off"),
    "calibrate": lambda model, out, text: qlinear.quantize(
        model, out, calibration=text, samples=2, seq_len=16
    ),
    "on ids": lambda model, out, text: qlinear.quantize(model, out, calibration=IDS),
    "evaluate": lambda model, out, text: qlinear.evaluate(model, data=IDS),
    "evaluate text": lambda model, out, text: qlinear.evaluate(model, data=text, tokens=32, seq_len=16),
    "convert": lambda model, out, text: qlinear.convert(model, out, "qlinear"),
}


def damage(file: Path, draw: random.Random) -> None:
    """Change a file: values of its JSON or of its safetensors header, or some of its bytes."""
    data = file.read_bytes()
    if file.suffix == ".safetensors" and draw.random() < 0.5:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_damaged(json.loads(data[8 : 8 + length]), draw)).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif file.suffix in (".json", ".jsonl") and draw.random() < 0.8:
        lines = data.decode().splitlines() if file.suffix == ".jsonl" else [data.decode()]
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(_damaged(json.loads(lines[at]), draw))
        data = "\n".join(lines).encode()
    else:
        data = _damaged_bytes(data, draw)
    file.write_bytes(data)


def _damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
    if kind == 2:
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at + 8 :]
    if kind == 3:
        return (
            data[: at // 100] + bytes([draw.randrange(256)]) + data[at // 100 + 1 :]
        )  # the beginning has the structure
    return b""


def _damaged(value: Any, draw: random.Random) -> Any:
    """A JSON value with one or two of its parts replaced, dropped, doubled or renamed."""
    for _ in range(draw.choice((1, 1, 2))):
        places = list(_places(value))
        if not places:
            return draw.choice(ODD)
        owner, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind == 0 and isinstance(owner, dict | list):
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[f"{key}{draw.choice(('x', '.weight', '_scale'))}"] = owner.pop(key)
        elif kind == 2 and isinstance(owner[key], int | float):
            owner[key] = draw.choice((owner[key] + 1, owner[key] * 2, -owner[key], owner[key] / 2))
        else:
            owner[key] = copy.deepcopy(draw.choice(ODD))  # a value must not come to stand inside itself
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _places(value[key])


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _work(numbers: range, bases: list[Path], send: Any) -> None:
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in numbers:
        send.send((number, "crashed"))
        send.send((number, run_case(number, bases)))
    send.send(None)


def _run(numbers: range, bases: list[Path]) -> dict[int, str]:
    """Do cases in a child; what failed by number. A crash ends a child, and another goes on behind it."""
    failed: dict[int, str] = {}
    while numbers:
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_work, args=(numbers, bases, send))
        child.start()
        send.close()
        done = False
        with contextlib.suppress(EOFError):
            while (message := receive.recv()) is not None:
                number, fault = message
                if fault is None:
                    failed.pop(number, None)
                else:
                    failed[number] = fault
            done = True
        child.join()
        numbers = range(numbers.stop, numbers.stop) if done else range(number + 1, numbers.stop)
    return failed


def main(count: int, first: int) -> int:
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        bases = prepare(Path(folder))
        for start in range(first, first + count, 200):
            numbers = range(start, min(start + 200, first + count))
            for number, fault in _run(numbers, bases).items():
                total += 1
                print(f"case {number}: {fault}", flush=True)
            print(f"{numbers.stop - first} cases, {total} failed", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(arguments + [10_000, 0][len(arguments) :])))
