"""The order of the rooms: imports run downwards only, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "coss_eval"

# each room may import from those before it; the package's own __init__ holds the version and resolves names when asked
ROOMS = [
    "__init__",
    "errors",
    "randomness",
    "runtime",
    "statistics",
    "store",
    "corruptions",
    "attacks",
    "data",
    "views",
    "models",
    "checkpoints",
    "receptive_field",
    "internal",
    "redundancy",
    "similarity",
    "probes",
    "tasks",
    "reports",
    "task reports",  # tasks/<name>/report.py, which reports find by name: nothing imports them
    "evaluation",
    "training",
    "sweeps",
    "_speaking",
    "cli",
    "__main__",
]


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py")}


def _room(module: str) -> str:
    if re.fullmatch(r"coss_eval\.tasks\.\w+\.report", module):
        return "task reports"
    return module.split(".")[1] if "." in module else "__init__"


def _imports(node: ast.AST, *, while_loading: bool) -> set[str]:
    """The package's modules that a module imports; ``while_loading``, those that it imports before it is used."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if while_loading and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.ImportFrom) and child.module is not None and _name_is_ours(child.module):
            inside = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= {name if name in MODULES else child.module for name in inside}
        found |= _imports(child, while_loading=while_loading)
    return found


def _name_is_ours(module: str) -> bool:
    return module.split(".")[0] == "coss_eval"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module: str) -> None:
    place = ROOMS.index(_room(module))
    imported = _imports(ast.parse(MODULES[module].read_text()), while_loading=False)
    upward = sorted(name for name in imported if ROOMS.index(_room(name)) > place)
    assert module == "coss_eval" or not upward


@pytest.mark.slow
def test_nothing_imports_the_reports_of_tasks() -> None:
    imported = {
        name for path in MODULES.values() for name in _imports(ast.parse(path.read_text()), while_loading=False)
    }
    assert [name for name in imported if _room(name) == "task reports"] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {
        name: _imports(ast.parse(path.read_text()), while_loading=True) - {name} for name, path in MODULES.items()
    }
    while arrows:  # take away what imports nothing that is left, until nothing is left
        ends = {name for name, targets in arrows.items() if not targets & set(arrows)}
        assert ends, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in ends}


def _types(module: ast.Module) -> list[str]:
    """The classes that a module defines, and the types that it gives a name; a leading underscore left out."""
    classes = [node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    targets = (target for node in ast.walk(module) if isinstance(node, ast.Assign) for target in node.targets)
    # a type is written in capital and small letters; once a module, as where type checkers are told another
    aliases = {node.id for node in targets if isinstance(node, ast.Name) and re.match(r"_*[A-Z]+[a-z]", node.id)}
    return [name.lstrip("_") for name in [*classes, *aliases]]


def test_each_type_has_a_name_of_its_own() -> None:
    """One word, one meaning: no class or named type of the package is called as another is, private or public."""
    counts = Counter(name for path in MODULES.values() for name in _types(ast.parse(path.read_text())))
    assert {name for name, count in counts.items() if count > 1} == set()


def test_types_of_one_name_are_seen() -> None:
    source = (
        "class Plan: ...\nif TYPE_CHECKING:\n  _Row = int\nelse:\n  _Row = str\nLIMIT = 3\ndef f():\n  class _Plan: ..."
    )
    assert sorted(_types(ast.parse(source))) == ["Plan", "Plan", "Row"]
