"""The house: imports point one way, no two modules need each other, and the docstrings list the files that exist."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qlinear

ROOT = Path(__file__).parents[1] / "src" / "qlinear"
# From the bottom to the top: a module imports from its own room and from rooms before it.
ROOMS = """
    errors runtime formats ops functional nn data demo algorithms smooth checkpoint streaming tracing calibration
    pipeline api report integrations cli __init__ __main__
""".split()  # noqa: SIM905
FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    """A file's module, without the package's own name; a folder stands for its `__init__`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """The modules of qlinear that a file imports, anywhere in it."""
    package = file.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(filter(None, base))
            for alias in node.names:
                inner = f"{start}.{alias.name}" if start else alias.name
                found.add(inner if inner in MODULES else start or "__init__")
    return found - {module_of(file)}


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down_the_house(file: Path) -> None:
    own = room(module_of(file))
    assert own in ROOMS, f"{own} has no place in the list of rooms"
    above = {name for name in imports_of(file) if ROOMS.index(room(name)) > ROOMS.index(own)}
    assert not above, f"{module_of(file)} imports {sorted(above)}, which stand above it"


def test_no_two_modules_need_each_other() -> None:
    tuple(TopologicalSorter({name: imports_of(file) for name, file in MODULES.items()}).static_order())


def listed(docstring: str) -> dict[str, set[str]]:
    """The rooms that a docstring lists, one a line as `name/  what it is: file, file`."""
    rooms: dict[str, set[str]] = {}
    for name, text in re.findall(r"^ {4}(\w+)/ +(.*(?:\n {8,}.*)*)", docstring, re.MULTILINE):
        rooms[name] = set(re.findall(r"\w+", text.rpartition(":")[2]))
    return rooms


@pytest.mark.parametrize("folder", ["", "algorithms", "checkpoint", "pipeline"])
def test_the_docstring_lists_the_files_that_exist(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()), clean=False) or ""
    for name, files in listed(docstring).items():
        exist = {f.stem for f in (ROOT / folder / name).iterdir() if f.suffix == ".py"} - {"__init__"}
        exist |= {d.name for d in (ROOT / folder / name).iterdir() if (d / "__init__.py").is_file()}
        assert files == exist, (
            f"{folder}/{name}: listed {sorted(files - exist)}, missing {sorted(exist - files)}"
        )
    if not folder:
        folders = {d.name for d in ROOT.iterdir() if (d / "__init__.py").is_file()}
        assert set(listed(docstring)) == folders


def test_every_room_says_what_it_is() -> None:
    silent = [name for name in MODULES if not ast.get_docstring(ast.parse(MODULES[name].read_text()))]
    assert not silent


def test_no_function_is_exported_under_the_name_of_its_module() -> None:
    for name in qlinear.__all__:
        assert not (ROOT / f"{name}.py").exists()
