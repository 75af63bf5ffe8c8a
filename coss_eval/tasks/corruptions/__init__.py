"""Accuracy under image corruptions, made here or read from files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from coss_eval.corruptions.names import NAMES, SEVERITIES, find
from coss_eval.corruptions.registry import Corruption, Function
from coss_eval.corruptions.severity import Flavour, TableName
from coss_eval.errors import UsageError
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import BackendFlag, Integers, Words

if TYPE_CHECKING:
    Names = tuple[str | Function, ...]
else:
    Names = Words  # a command line has no functions


@dataclass(frozen=True)
class CorruptionsOptions:
    """Accuracy under the image corruptions of ImageNet-C (Hendrycks & Dietterich 2019), or those in --names.

    They are applied to the stored uint8 pixels on the fly. Where --data is a ready-made benchmark (an ImageNet-C or
    Tiny-ImageNet-C folder, CIFAR-10-C's arrays), its files are read as they are, and --backend, --flavour and --table
    have no say.
    """

    names: Annotated[Names, Parameter(show_default=lambda _: "all")] = tuple(NAMES)
    "From coss-eval list corruptions, package.module:function for one of your own, or what a ready-made set has."
    severities: Integers = SEVERITIES
    "Of each corruption, 1 (mildest) to 5."
    backend: BackendFlag = "native"
    flavour: Flavour = "imagecorruptions"
    "Which to follow where the package imagecorruptions and ImageNet-C's original code differ."
    table: TableName | None = None
    "The images whose published severities are used [default: by the side of the images]."

    def __post_init__(self) -> None:
        if len(set(self.named)) < len(self.names):
            raise UsageError(f"expected each corruption once, got {', '.join(map(_name, self.names))}")
        if self.backend == "reference" and (own := [name for name in self.named if name not in NAMES]):
            raise UsageError(f"the reference backend has no {own[0]}; it has the corruptions of imagecorruptions")
        if not self.severities or any(severity not in SEVERITIES for severity in self.severities):
            raise UsageError(f"severities must be among 1 to 5, got {list(self.severities)}")
        if len(set(self.severities)) < len(self.severities):
            raise UsageError(f"expected each severity once, got {', '.join(map(str, self.severities))}")

    @cached_property
    def named(self) -> tuple[str, ...]:
        """What is evaluated, by name alone: a ready-made set may have corruptions that are not the package's."""
        plain = [isinstance(wanted, str) and ":" not in wanted for wanted in self.names]
        return tuple(
            str(wanted) if as_it_is else find(wanted).name for wanted, as_it_is in zip(self.names, plain, strict=True)
        )

    @cached_property
    def corruptions(self) -> dict[str, Corruption]:
        """What is evaluated, by name; found once, so that all of a run is of one function. UsageError for unknown."""
        return {found.name: found for found in map(find, self.names)}


def _name(wanted: str | Function) -> str:
    return wanted if isinstance(wanted, str) else getattr(wanted, "__name__", str(wanted))


ENTRY = TaskEntry(
    name="corruptions",
    about=f"accuracy under {len(NAMES)} image corruptions at {len(SEVERITIES)} severities",
    source="Hendrycks & Dietterich 2019",
    options=CorruptionsOptions,
    home="coss_eval.tasks.corruptions.task:Corruptions",
    order=20,
    small={"severities": (3,)},
)
