"""What the store keeps: measurements under their conditions, and the cells that they belong to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError

if TYPE_CHECKING:
    pass


class StoreWarning(UserWarning):
    """A file of the store that cannot be used as it is; says which and what happens instead."""


@dataclass(frozen=True)
class Measurement:
    """One number with its n and interval, under one condition (corruption=fog, severity=3).

    ``value`` of a proportion is a fraction; ``low`` and ``high`` bound its 95 % interval, None where none is defined.
    """

    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    condition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What one job computes and the store keeps: a task and the JSON parameters its numbers depend on.

    ``defaults`` holds the value that a parameter had when it was introduced; parameters still at it are left out of
    the key, so that adding one keeps the keys of everything already stored.
    """

    task: str
    params: dict[str, Any]
    algorithm_version: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)


def column_name(metric: str, condition: Mapping[str, Any]) -> str:
    """The column of ``samples`` with a measurement's per-sample verdicts: "corruption=fog,severity=3".

    Floats have six digits; an unconditional measurement's column is its metric.
    """
    parts = (
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in condition.items()
    )
    return ",".join(parts) or metric


def canonical_json(value: Any) -> str:
    """The one JSON text of a value, for hashing: keys sorted, no spaces, shortest floats, 1.0 written as 1.

    Raises UsageError for what has no JSON form (NaN, infinity, objects, keys that are not text).
    """
    return json.dumps(_plain(value, canonical=True), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any, *, canonical: bool = False) -> Any:
    """JSON's own types: dataclasses and NumPy scalars and arrays unpacked; NaN and infinity become None.

    ``canonical`` refuses what is not finite and writes whole floats as integers.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UsageError(f"a stored mapping needs text for keys, got {list(value)!r}")
        return {name: _plain(item, canonical=canonical) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, canonical=canonical) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            if canonical:
                raise UsageError(f"a protocol cannot hold {value}")
            return None
        return int(value) if canonical and value.is_integer() else value
    if value is None or isinstance(value, str | int):
        return value
    raise UsageError(f"cannot store a {type(value).__name__}: {value!r}; give text, numbers, lists or mappings")


def _check_distinct(measurements: list[dict[str, Any]]) -> None:
    names = [(m["metric"], canonical_json(m["condition"])) for m in measurements]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two measurements of one cell are both {twice[0]} under {twice[1]}; tell them apart")
