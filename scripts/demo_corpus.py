"""The text of the embedded model: the documentation that ships inside Python (PSF licence).

A document is one help topic of `pydoc_data.topics`, or the docstrings and longer comments of one module of the
standard library in source order. Modules that carry a copyright notice other than the Python Software
Foundation's are left out. The split is by document and decided by a hash of the document's name, so it does not
depend on what else is there; a paragraph goes to the first of evaluation, calibration and training that holds it,
because help topics quote one another at length.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

STDLIB = Path(sysconfig.get_paths()["stdlib"])
NOT_PYTHON = {"site-packages", "dist-packages", "ensurepip", "pydoc_data"}  # bundled, or generated
TESTS = {"test", "tests", "idle_test"}
EVALUATION_SHARE, CALIBRATION_SHARE = 0.055, 0.10
SHORTEST_BLOCK = 40  # characters; below that a docstring says little more than its name
SHORTEST_COMMENT = 3  # lines; shorter comments speak of code that is not there


def _foreign(source: str) -> bool:
    """Whether somebody other than the PSF claims the copyright, without having licensed it to the PSF."""
    notices = [line for line in source.splitlines() if re.search(r"copyright \(?[c(\d]", line, re.IGNORECASE)]
    return "Licensed to PSF" not in source and any("Python Software" not in line for line in notices)


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""]):
        if line.lstrip().startswith("#"):
            block.append(re.sub(r"^\s*#+ ?", "", line).rstrip())
            continue
        if len(block) >= SHORTEST_COMMENT:
            yield number, textwrap.dedent("\n".join(block))
        block = []


def _module_text(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # inputs of the standard library's own tests
        return ""
    if _foreign(source):
        return ""
    pieces = sorted([*_docstrings(tree), *_comments(source)])
    return "\n\n".join(text.strip("\n") for _, text in pieces if len(text) >= SHORTEST_BLOCK)


def documents() -> dict[str, str]:
    """Name → text of every document, sorted by name."""
    found = {f"topic/{name}": text.strip() for name, text in topics.items()}
    for path in STDLIB.rglob("*.py"):
        place = path.relative_to(STDLIB)
        if not NOT_PYTHON & set(place.parts):
            found[f"module/{place.as_posix()}"] = _module_text(path)
    return dict(sorted(found.items()))


def _part(name: str) -> int:
    """0 evaluation, 1 calibration, 2 training. The standard library's tests are for training only."""
    if TESTS & set(name.split("/")):
        return 2
    drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return 0 if drawn < EVALUATION_SHARE else 1 if drawn < EVALUATION_SHARE + CALIBRATION_SHARE else 2


def split() -> tuple[list[str], list[str], list[str]]:
    """Evaluation, calibration and training documents; no paragraph is in two of them."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    seen: set[str] = set()
    for name, text in sorted(documents().items(), key=lambda item: (_part(item[0]), item[0])):
        paragraphs = dict.fromkeys(re.split(r"\n\s*\n", text))
        fresh = [p for p in paragraphs if " ".join(p.split()) not in seen]
        seen.update(" ".join(p.split()) for p in fresh)
        text = "\n\n".join(p.rstrip() for p in fresh)
        if len(text) >= 4 * SHORTEST_BLOCK:
            parts[_part(name)].append(text)
    return parts
