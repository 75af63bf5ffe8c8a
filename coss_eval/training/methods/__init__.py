"""The methods: each file of this folder is one, by its name, and says in its first line what it is, with its source.

"co-byol" is byol with the CO term beside it; the prefix goes with every method that compares two views. A method of
one's own is "package.module:Class". Importing this module imports no method, and so no torch.
"""

from __future__ import annotations

from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.imports import imported
from coss_eval.training.fields import build

if TYPE_CHECKING:
    from coss_eval.training.method import Method

PREFIX = "co-"


def _first_lines() -> dict[str, str]:
    files = {file.name.removesuffix(".py"): file for file in resources.files(__name__).iterdir()}
    names = sorted(name for name, file in files.items() if file.name.endswith(".py") and name != "__init__")
    return {name: files[name].read_text().splitlines()[0].strip('"').rstrip(".") for name in names}


METHODS = _first_lines()
"""Every method of the package by its name, with the line about it."""


def method_class(name: str) -> type[Method]:
    """The method of that name, without the prefix: one of METHODS, or "package.module:Class"."""
    from coss_eval.training.method import Method

    if ":" in name:
        own = imported(name, "method", "class")
        if isinstance(own, type) and issubclass(own, Method):
            return own
        raise UsageError(f"method {name!r} must be a class derived from coss_eval.training.method.Method, not {own!r}")
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    module = import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    )
    return found


def names() -> list[str]:
    """The package's methods without and with the CO term."""
    return [*METHODS, *(PREFIX + name for name in METHODS if method_class(name).targets != "labels")]


def split_name(name: str) -> tuple[str, bool]:
    """The base method, and whether the CO term is asked for: "co-byol" is ("byol", True)."""
    base = name.removeprefix(PREFIX)
    if ":" not in base and base not in METHODS:
        raise unknown_name("method", name, names())
    if base != name and method_class(base).targets == "labels":
        raise UsageError(f"{name}: the CO term compares two views, which {base} does not")
    return base, base != name


def make_method(name: str, **overrides: Any) -> Method:
    """The method of that name ("byol" and "co-byol" alike), its hyper-parameters replaced by ``overrides``."""
    base, _ = split_name(name)
    return build(method_class(base), overrides, f"field of {base}")
