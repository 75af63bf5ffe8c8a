"""Accuracy under image corruptions, made here or read from files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from coss_eval.corruptions.names import NAMES, SEVERITIES, check_name
from coss_eval.corruptions.severity import Flavour, Table
from coss_eval.errors import UsageError
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import Backend, Integers, Words


@dataclass(frozen=True)
class CorruptionsOptions:
    """Accuracy under the image corruptions of ImageNet-C (Hendrycks & Dietterich 2019), or those in --names.

    They are applied to the stored uint8 pixels on the fly. Where --data is a ready-made benchmark (an ImageNet-C or
    Tiny-ImageNet-C folder, CIFAR-10-C's arrays), its files are read as they are, and --backend, --flavour and --table
    have no say.
    """

    names: Annotated[Words, Parameter(show_default=lambda _: "all")] = tuple(NAMES)
    "Names from coss-eval list corruptions."
    severities: Integers = SEVERITIES
    "Of each corruption, 1 (mildest) to 5."
    backend: Backend = "native"
    flavour: Flavour = "imagecorruptions"
    "Which to follow where the package imagecorruptions and ImageNet-C's original code differ."
    table: Table | None = None
    "The images whose published severities are used [default: by the side of the images]."

    def __post_init__(self) -> None:
        for name in self.names:
            check_name(name)
        if not self.severities or any(severity not in SEVERITIES for severity in self.severities):
            raise UsageError(f"severities must be among 1 to 5, got {list(self.severities)}")


ENTRY = TaskEntry(
    name="corruptions",
    about=f"accuracy under {len(NAMES)} image corruptions at {len(SEVERITIES)} severities",
    source="Hendrycks & Dietterich 2019",
    options=CorruptionsOptions,
    home="coss_eval.tasks.corruptions.task:Corruptions",
    order=20,
    small={"severities": (3,)},
)
