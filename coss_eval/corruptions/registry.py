"""What a corruption is: one function, and what is declared beside it; torch-free.

A function takes images uint8 (B, 3, H, W), the Setting (severity, its parameters, table, flavour) and Draws, the
images' own random numbers. It returns the corrupted images, as uint8 or as floats on the scale 0 to 255, which are
clipped and truncated. It is handed any part of a batch: an image's pixels must depend on its own row and draws alone.

    @corruption("dim", severities=(0.9, 0.8, 0.7, 0.6, 0.5))
    def dim(images, setting, draws):
        (factor,) = setting.parameters
        return images * factor
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from coss_eval.corruptions.severity import (
    SEVERITIES,
    TABLES,
    Flavour,
    Setting,
    SeverityParameters,
    TableName,
    check_severity,
    check_table,
)
from coss_eval.errors import UsageError
from coss_eval.runtime.code_identity import UNKNOWN, code_identity, is_foreign

if TYPE_CHECKING:
    from torch import Tensor

    from coss_eval.corruptions.draws import Draws

Category = Literal["noise", "blur", "weather", "digital", "other"]
Set = Literal["benchmark", "validation", "extra"]
SeverityRows = Sequence[float | SeverityParameters]
"""Five severities' parameters; a number alone is one parameter."""
Function = Callable[["Tensor", Setting, "Draws"], "Tensor"]
AnyFunction = TypeVar("AnyFunction", bound=Function)

MIN_SIDE = 32
"""imagecorruptions' own limit: below it kernels, maps and textures no longer fit."""

_NAME = re.compile(r"\w[\w.-]*")  # it names files and columns


@dataclass(frozen=True)
class Corruption:
    """A corruption by name. ``set``: of the published benchmark, held out for validation, or in neither (extra).

    ``severities``: each table's five parameters. ``image_by_image``: most of its time goes into calls for single
    images, which several of Python's threads share. ``on_cpu``: the severities that are computed on the CPU wherever
    the images are. ``code``: the identity of a function that is not the package's, a part of every key. ``min_side``:
    of images, below which its kernels, maps or textures no longer fit.
    """

    name: str
    function: Function
    category: Category
    set: Set
    severities: Mapping[TableName, tuple[SeverityParameters, ...]] = field(repr=False)
    image_by_image: bool = False
    on_cpu: tuple[int, ...] = ()
    code: str | None = None
    min_side: int = 1

    def parameters(self, severity: int, table: TableName) -> SeverityParameters:
        """Those at ``severity`` (1 to 5) in ``table``; none where none are declared."""
        rows = self.severities
        return rows[check_table(table)][check_severity(severity) - 1] if rows else ()

    def at(self, severity: int, table: TableName = "imagenet", flavour: Flavour = "imagecorruptions") -> Setting:
        """The setting that the function is called with."""
        return Setting(check_severity(severity), self.parameters(severity, table), table, flavour)


CORRUPTIONS: dict[str, Corruption] = {}
"""Every registered corruption by name."""


def corruption(
    name: str,
    *,
    category: Category = "other",
    set: Set = "extra",
    severities: Mapping[TableName, SeverityRows] | SeverityRows | None = None,
    image_by_image: bool = False,
    on_cpu: tuple[int, ...] = (),
    min_side: int = 1,
) -> Callable[[AnyFunction], AnyFunction]:
    """Register a function under a name; see Corruption.

    ``severities`` are parameters for the five severities, by table or the same for all; None: the function goes by
    ``setting.severity``. Raises UsageError for a name that the package has, and for what cannot be told from another
    version of itself (see ``code_of``).
    """

    def registered(function: AnyFunction) -> AnyFunction:
        CORRUPTIONS[_free(name, function)] = Corruption(
            name,
            function,
            category,
            _set_of(function, set),
            _by_table(name, severities),
            image_by_image,
            on_cpu,
            code_of(function),
            min_side,
        )
        return function

    return registered


def register(name: str, function: Function, **declared: Any) -> Corruption:
    """``corruption(name, **declared)`` for a function that exists already.

    >>> def darker(images, setting, draws):
    ...     return images * (1 - 0.1 * setting.severity)
    >>> register("darker", darker).category
    'other'
    """
    corruption(name, **declared)(function)
    return CORRUPTIONS[name]


def of_function(function: Function) -> Corruption:
    """The corruption that a function was registered as; else one under the function's own name."""
    for known in CORRUPTIONS.values():
        if known.function is function:
            return known
    code = code_of(function)
    return Corruption(_free(function.__name__, function), function, "other", _set_of(function, "extra"), {}, code=code)


def code_of(function: Function) -> str | None:
    """What tells a function from another version of itself: None for the package's own, else its source or version.

    Raises UsageError where neither is known, and for values from around a function that its source does not show; an
    attribute ``version``, raised by hand, stands for both.
    """
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise UsageError(f"a corruption is a function with a name of its own, got {function!r}; write it with def")
    if not is_foreign(function.__module__):
        return None
    code, hint = (
        code_identity([function]),
        f"give it one: {function.__name__}.version = 1, raised when its pixels change",
    )
    if code == UNKNOWN:
        raise UsageError(
            f"the source of the corruption {function.__name__} cannot be read, and it has no version; {hint}"
        )
    if function.__closure__ and not hasattr(function, "version"):
        held = ", ".join(function.__code__.co_freevars)
        raise UsageError(f"the corruption {function.__name__} depends on {held}, outside its source; {hint}")
    return code


def _free(name: str, function: Function) -> str:
    """The name, where it may be given to the function."""
    if not _NAME.fullmatch(name) or name == "clean":
        raise UsageError(f"a corruption's name has letters, digits, _, - and ., and is not clean; got {name!r}")
    there = CORRUPTIONS.get(name)
    if there is not None and there.code is None and there.function is not function:
        raise UsageError(f"the package has a corruption {name} already; register yours under another name")
    return name


def _set_of(function: Function, set: Set) -> Set:
    if set != "extra" and is_foreign(function.__module__):
        raise UsageError(f"the set {set} is the published one; yours are extra")
    return set


def _by_table(
    name: str, severities: Mapping[TableName, SeverityRows] | SeverityRows | None
) -> dict[TableName, tuple[SeverityParameters, ...]]:
    if severities is None:
        return {}
    given = severities if isinstance(severities, Mapping) else dict.fromkeys(TABLES, severities)
    if set(given) != set(TABLES) or any(len(rows) != len(SEVERITIES) for rows in given.values()):
        raise UsageError(f"{name}: expected parameters for {len(SEVERITIES)} severities, alike or for each of {TABLES}")
    return {table: tuple(row if isinstance(row, tuple) else (row,) for row in rows) for table, rows in given.items()}
