"""What the store keeps: measurements under their conditions, and the cells that they belong to."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from coss_eval.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


class StoreWarning(UserWarning):
    """A file of the store that cannot be used as it is; says which and what happens instead."""


def warn(message: str) -> None:
    """A StoreWarning for the caller's caller."""
    warnings.warn(message, StoreWarning, stacklevel=3)


Record = dict[str, Any]  # a cell or a run as it is stored


class SampleColumns(NamedTuple):
    """The samples of a cell: ``ids`` (N,) of its images, and a number for each of them (N,) under a column's name."""

    ids: NDArray[np.int64]
    values: dict[str, NDArray[Any]]

    def table(self) -> pd.DataFrame:
        """The same indexed by id: dear where there are many cells, so reports do without."""
        import pandas as pd

        return pd.DataFrame(self.values, index=pd.Index(self.ids, name="id"))


class Condition(Mapping[str, Any]):
    """What a number was measured under, an immutable mapping: Condition(corruption="fog", severity=3).

    Its text, which names the column of its samples, has the names in the order given and floats with six digits.
    Conditions are equal where names and values are, in any order; 1 is 1.0, and floats are equal where six digits are:
    columns could not tell others apart, and results of older versions were looked up by that text.

    >>> str(Condition(corruption="fog", severity=3)), Condition(a=1, b=2) == Condition(b=2.0, a=1)
    ('corruption=fog,severity=3', True)
    """

    __slots__ = ("_identity", "_values")

    def __init__(self, values: Mapping[str, Any] = MappingProxyType({}), /, **named: Any) -> None:
        self._values = {**values, **named}
        self._identity = frozenset((name, _identity(value)) for name, value in self._values.items())

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Condition):
            return self._identity == other._identity
        return Condition(other)._identity == self._identity if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def __str__(self) -> str:
        return ",".join(f"{name}={text}" for name, text in self.texts().items())

    def __repr__(self) -> str:
        return f"Condition({self._values!r})"

    def texts(self) -> dict[str, str]:
        """Each value as the condition's text has it."""
        return {name: f"{v:.6g}" if isinstance(v, float) else str(v) for name, v in self._values.items()}

    def includes(self, **named: Any) -> bool:
        """Whether it has these values under these names."""
        return Condition(named).within(self)

    def within(self, other: Condition) -> bool:
        """Whether the other has all of its values, and perhaps more."""
        return self._identity <= other._identity

    def without(self, *names: str) -> Condition:
        """The rest of it."""
        return Condition({name: value for name, value in self._values.items() if name not in names})


def _identity(value: Any) -> Any:
    """A value as conditions compare it."""
    if isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple | Mapping):
        return canonical_json(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


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
    condition: Mapping[str, Any] = Condition()

    def __post_init__(self) -> None:
        object.__setattr__(self, "condition", Condition(self.condition))


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
    """The column of ``samples`` with a measurement's per-sample verdicts: its condition's text, or else its metric."""
    return str(Condition(condition)) or metric


def own_column(metric: str, condition: Mapping[str, Any]) -> str:
    """The column of ``samples`` with each image's share of a measurement that others have the condition of."""
    return f"{metric}: {Condition(condition)}"


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
    names = [(m["metric"], Condition(m["condition"])) for m in measurements]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        shown = canonical_json(twice[1])
        raise UsageError(f"two measurements of one cell are both {twice[0]} under {shown}; tell them apart")
