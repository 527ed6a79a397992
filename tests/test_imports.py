"""Imports point one way: a module may import what stands above it in the design's list, never below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "qlinear"
TIERS = (
    "errors | memory scheme device cores | numerics packing | ops | functional | nn | structure smooth blocks ranks "
    "data | calibrate | algorithms | checkpoint | demo | inputs plan | evaluation inspection generation inplace | "
    "job relayout | report | integrations | cli | __init__ __main__"
)
TIER = {name: tier for tier, names in enumerate(TIERS.split("|")) for name in names.split()}


def imported_modules(file: Path) -> set[str]:
    """Top-level modules of qlinear that the file imports, its own package left out."""
    package = ("qlinear", *file.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module or "").split(".")] if node.module else [*base]
            names = [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "qlinear" and len(name) > 1}
    own = package[1] if len(package) > 1 else file.stem
    return {name for name in found if name in TIER and name != own}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_upwards(file: Path) -> None:
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in TIER, f"{own} has no place in the design's list"
    below = {name for name in imported_modules(file) if TIER[name] > TIER[own]}
    assert not below, f"{own} imports {sorted(below)}, which stand below it"
