"""What a corruption is asked for, torch-free: a severity of one of the published tables, in one of two flavours.

"imagenet" is ImageNet-C's table (224 px), "tiny-imagenet" Tiny-ImageNet-C's (64 px), "cifar" CIFAR-10-C's (32 px). Each
corruption's parameters stand beside its function; lengths are in pixels, intensities in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from coss_eval.errors import UsageError, unknown_name

TableName = Literal["imagenet", "tiny-imagenet", "cifar"]
Flavour = Literal["imagecorruptions", "imagenet-c"]
Parameters = tuple[float, ...]

SEVERITIES = (1, 2, 3, 4, 5)
TABLES: tuple[TableName, ...] = get_args(TableName)


@dataclass(frozen=True)
class Setting:
    """One severity of a corruption, with all that its pixels depend on beside the image and its draws.

    ``parameters`` are those of the severity in ``table``. ``flavour`` "imagecorruptions" follows that package,
    "imagenet-c" the benchmark's original code where they differ.
    """

    severity: int
    parameters: Parameters
    table: TableName = "imagenet"
    flavour: Flavour = "imagecorruptions"


def table_for(size: tuple[int, int]) -> TableName:
    """The table for images of ``size`` (height, width): the nearest of 32, 64 and 224 to the shorter side, in ratio."""
    side = min(size)
    if side <= 45:  # the geometric mean of 32 and 64
        return "cifar"
    if side <= 119:  # that of 64 and 224
        return "tiny-imagenet"
    return "imagenet"


def check_table(table: str) -> TableName:
    """``table`` itself if it is one of TABLES; UsageError with the nearest names otherwise."""
    for known in TABLES:
        if table == known:
            return known
    raise unknown_name("severity table", table, TABLES)


def check_severity(severity: int) -> int:
    """``severity`` itself if it is an integer from 1 to 5; UsageError otherwise."""
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise UsageError(f"severity must be an integer from 1 to 5, got {severity!r}")
    return int(severity)
