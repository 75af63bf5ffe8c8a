"""The identity of code that is not the package's: it decides numbers as weights do, so it stands in their keys."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

PACKAGES = ("coss_eval", "torch", "torchvision", "timm")
"""Code whose changes are told by versions: of algorithms (ours), and of the packages in run.json (the others')."""
UNKNOWN = "unknown"


def is_foreign(module: str) -> bool:
    """Whether a module is neither this package's nor one of those its networks are built from."""
    root = module.partition(".")[0]
    return root not in PACKAGES and root not in sys.stdlib_module_names


def code_identity(things: Iterable[Any]) -> str | None:
    """16 hex digits of all code that the classes or functions among ``things`` stand in; None where none is foreign.

    ``things``: classes, functions, or names of imported modules. One with a ``version`` attribute is named by that.
    Of the others, and of the classes they inherit from, the source text of their whole module counts (helpers beside a
    class decide numbers, too) with those that it imports from outside site-packages, or where that cannot be read, as
    in a notebook, of the thing itself. UNKNOWN where the source of one cannot be read at all.
    """
    whole = {base for thing in things for base in (thing.__mro__ if isinstance(thing, type) else [thing])}
    foreign = [thing for thing in whole if is_foreign(_module_of(thing))]
    found = {_of(thing) for thing in foreign}
    if not found:
        return None
    unversioned = {_module_of(thing) for thing in foreign if _version(thing) is None}
    found |= {text for name in _imported(unversioned - {"__main__"}) if (text := _of(name)) != UNKNOWN}
    return UNKNOWN if UNKNOWN in found else hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def edited(name: str) -> list[str]:
    """The modules, ``name`` and what it imports from outside site-packages, whose files have changed since they were
    first asked for here: what runs is what they were.
    """
    own = {name} if is_foreign(name) and _is_loose(name) else set()
    found = []
    for module in sorted(own | _imported(own)):
        with suppress(OSError, TypeError):
            if _read(sys.modules.get(module)) != inspect.getsource(sys.modules[module]):
                found.append(module)
    return found


def _read(source: Any) -> str:
    """The text of a class, a function or a module. Raises OSError and TypeError where there is none.

    A module's is that of the first call, kept with its spec, which a reload replaces: a file that is edited afterwards
    does not change the code that was imported. (What Python read before the first call, nothing tells.)
    """
    spec = getattr(source, "__spec__", None)
    if spec is None:
        try:
            lines = inspect.getsource(source)
        except (OSError, TypeError):
            return _members(source)
        # Python 3.13 takes the main module's file for that of every class whose module is the main one
        is_other = isinstance(source, type) and not re.search(rf"^\s*class {source.__name__}\b", lines, re.MULTILINE)
        return _members(source) if is_other else lines
    if not hasattr(spec, "source_text"):
        spec.source_text = inspect.getsource(source)
    text: str = spec.source_text
    return text


def _members(source: Any) -> str:
    """The text of a class from a cell of a notebook, where only functions know their file: methods and plain values.

    Raises OSError where it has no method, TypeError where one cannot be read.
    """
    members = dict(vars(source)) if isinstance(source, type) else {}
    texts = [inspect.getsource(value) for value in members.values() if inspect.isfunction(value)]
    if not texts:
        raise OSError("no source")
    plain = (f"{name} = {value!r}" for name, value in members.items() if isinstance(value, bool | int | float | str))
    return "\n".join([*texts, *(line for line in plain if not line.startswith("__"))])


def _of(thing: Any) -> str:
    if (version := _version(thing)) is not None:
        return f"{_name(thing)} version {version}"
    module = sys.modules.get(_module_of(thing))
    # the main module's file is the script that asks for numbers: changing how many it asks for changes none of them
    sources = [thing] if not isinstance(thing, str) and _module_of(thing) == "__main__" else [module, thing]
    for source in sources:
        try:
            return f"{_name(thing)} {hashlib.sha256(_read(source).encode()).hexdigest()}"
        except (OSError, TypeError):  # no file, as in `python -c`, or nothing that has one
            continue
    return UNKNOWN


def _version(thing: Any) -> str | int | float | None:
    """Its own version: one that a class inherits says nothing of what the class itself adds."""
    version = getattr(thing, "__dict__", {}).get("version")
    return version if isinstance(version, str | int | float) else None


def _imported(names: set[str]) -> set[str]:
    """The modules that these import, and those import in turn, that no package manager has put where they are."""
    found, left = set[str](), list(names)
    while left:
        new = {name for name in _imports(left.pop()) if is_foreign(name) and _is_loose(name)} - found - names
        found |= new
        left += new
    return found


def _imports(name: str) -> set[str]:
    """What a module's import statements name: modules, and names in them that may be modules."""
    module, found = sys.modules.get(name), set[str]()
    try:
        tree = ast.parse(_read(module))
    except (OSError, TypeError, SyntaxError):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            with suppress(ImportError):  # relative, in what is no package
                base = resolve_name(base, getattr(module, "__package__", None) or name)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _is_loose(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None) or "site-packages"
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _module_of(thing: Any) -> str:
    return thing if isinstance(thing, str) else str(getattr(thing, "__module__", "") or "")


def _name(thing: Any) -> str:
    return thing if isinstance(thing, str) else f"{_module_of(thing)}.{getattr(thing, '__qualname__', '')}"
