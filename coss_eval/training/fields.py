"""Frozen dataclasses from what a person wrote: unknown names with a suggestion, values of the right type; YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.disk import read_text

T = TypeVar("T")
MOST_TEXT, MOST_BRACKETS = 2**17, 500  # of a file that people write: reading YAML takes the square of its brackets
MOST_ALIASES = 20  # nine of nine of nine ... are 9^n values


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file says, where it is one that a person may have written: nothing is called, nothing unfolds.

    ``what`` names it in the UsageError for any other.
    """
    try:
        text = read_text(path)
        if len(text) > MOST_TEXT or text.count("[") + text.count("{") > MOST_BRACKETS:
            raise UsageError(
                f"{what}: longer or more nested than what people write "
                f"(more than {MOST_TEXT >> 10} KiB, or {MOST_BRACKETS} brackets)"
            )
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)) > MOST_ALIASES:
            raise UsageError(f"{what}: more than {MOST_ALIASES} aliases (*name); write the values out")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UsageError(f"{what}: no YAML that is read ({reason})") from error


def build(cls: type[T], values: Mapping[str, Any], kind: str) -> T:
    """``cls(**values)``, every value checked against its annotation; ``kind`` ("field of byol") names them in errors.

    Whole numbers pass as floats, and lists as tuples. A mapping becomes the dataclass that its field asks for.
    Raises UsageError for unknown names, for values of another type and for fields that must be there and are not.
    """
    known = {field.name: field for field in _fields(cls)}
    hints = _hints(cls)  # type: ignore[arg-type]  # a class can be hashed
    for name in values:
        if name not in known:
            raise unknown_name(kind, name, known)
    missing = [name for name, field in known.items() if name not in values and _must_be_given(field)]
    if missing:
        raise UsageError(f"{kind} missing: {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")
    return cls(**{name: _fitting(value, hints[name], kind, name) for name, value in values.items()})


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    """The annotations of a class, which Python compiles anew each time: most of what a configuration costs."""
    return get_type_hints(cls)


def _fields(cls: type) -> tuple[Field[Any], ...]:
    return fields(cls)


def _must_be_given(field: Field[Any]) -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _fitting(value: Any, hint: Any, kind: str, name: str) -> Any:
    options = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if get_origin(hint) in (dict, tuple):
        options = (hint,)
    for option in options:
        fits, fitting = _try(value, option, name)
        if fits:
            return fitting
    raise UsageError(f"{kind} {name!r}: expected {_shown(options)}, got {value!r}")


def _try(value: Any, option: Any, name: str) -> tuple[bool, Any]:
    """Whether the value fits one option of an annotation, and the value as that type."""
    origin = get_origin(option)
    if origin is Literal:
        return value in get_args(option), value
    if origin is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    if origin is tuple:  # of any length
        if not isinstance(value, (list, tuple)):
            return False, value
        tried = [_try(each, get_args(option)[0], name) for each in value]
        return all(fits for fits, _ in tried), tuple(fitting for _, fitting in tried)
    if option is Any:
        return True, value
    if hasattr(option, "__dataclass_fields__"):
        if isinstance(value, Mapping):
            return True, build(option, value, f"field of {name}")
        return isinstance(value, option), value
    if option is float:
        value = _number(value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number, float(value) if number else value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, option), value


def _number(value: Any) -> Any:
    """YAML takes 1e-6 for a text (it wants 1.0e-6); people take it for a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _shown(options: tuple[Any, ...]) -> str:
    names = []
    for option in options:
        if get_origin(option) is Literal:
            names += [repr(choice) for choice in get_args(option)]
        else:
            name = getattr(option, "__name__", str(option))
            names.append({"NoneType": "nothing", "tuple": "a list", "dict": "a mapping"}.get(name, name))
    return " or ".join(names)
