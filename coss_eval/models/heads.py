"""Whether a checkpoint's own head fits a dataset's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coss_eval.errors import UsageError
from coss_eval.models.choices import HeadChoice
from coss_eval.models.model import Model


@dataclass(frozen=True)
class HeadDecision:
    """``class_map``: for each of the dataset's classes, the head's output; None where they correspond one to one.

    ``why`` says in words what was decided, for logs and reports.
    """

    use_own: bool
    class_map: tuple[int, ...] | None
    why: str


def resolve_head(model: Model, classes: Sequence[str], choice: HeadChoice | None = None) -> HeadDecision:
    """How the head of ``model`` applies to a dataset's ``classes`` (default choice: the model's own).

    "auto" uses the own head only where every class of the dataset is among the head's by name: in the same order as
    it is, else through a map. "own" asserts that the head's order is the dataset's, and raises UsageError where sizes
    or names contradict that (integers number classes and name none: they are taken by value). "probe" never uses it.
    """
    choice = choice or model.head_choice
    if choice not in ("auto", "own", "probe"):
        raise UsageError(f"head must be auto, own or probe, not {choice!r}")
    if choice == "own":
        return _own(model, tuple(classes))
    if choice == "probe":
        return HeadDecision(False, None, "a probe, as asked")
    if model.head is None:
        return HeadDecision(False, None, "a probe: the checkpoint has no classifier head")
    if model.classes is None:
        return HeadDecision(False, None, "a probe: the checkpoint does not name its head's classes")
    if model.classes == tuple(classes):
        return HeadDecision(True, None, "own head: its classes are the dataset's")
    outputs = {name: i for i, name in enumerate(model.classes)}
    absent = [name for name in classes if name not in outputs]
    if absent:
        return HeadDecision(False, None, f"a probe: the head has no class {absent[0]!r} ({len(absent)} such)")
    mapped = tuple(outputs[name] for name in classes)
    return HeadDecision(True, mapped, f"own head: {len(classes)} of its {len(model.classes)} classes, by name")


def _own(model: Model, classes: tuple[str, ...]) -> HeadDecision:
    if model.head is None:
        raise UsageError(f"{model.name} has no classifier head; use --head probe")
    size = head_size(model.head)
    if size != len(classes):
        raise UsageError(
            f"the head of {model.name} has {size} outputs, the dataset {len(classes)} classes; use --head auto or probe"
        )
    places, known = _integers(classes), model.classes
    if known is None or (places and _integers(known) is None):
        order = places or tuple(range(size))
        first, last = classes[order.index(0)], classes[order.index(size - 1)]
        why = f"own head, order ASSUMED (--head own): output 0 is taken for class {first!r}, {size - 1} for {last!r}"
        return HeadDecision(True, None if order == tuple(range(size)) else order, why)
    if known != classes and set(known) == set(classes):
        raise UsageError(f"the head of {model.name} has the dataset's classes in another order; --head auto maps them")
    if known != classes:
        at = next(i for i in range(size) if known[i] != classes[i])
        raise UsageError(
            f"the head of {model.name} has other classes than the dataset (output {at} is {known[at]!r}, "
            f"the dataset's class {at} {classes[at]!r}); use --head auto or probe, or rename the class folders"
        )
    return HeadDecision(True, None, "own head: its classes are the dataset's")


def _integers(classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """For class names that are integers (a numbering, and no names), the rank of each by value; else None.

    Sorted as words, 0, 1, 10, 100, ... would scramble a head.
    """
    if not all(name.isdecimal() and name.isascii() for name in classes):
        return None
    values = [int(name) for name in classes]
    ranks = {value: rank for rank, value in enumerate(sorted(values))}
    return tuple(ranks[value] for value in values) if len(ranks) == len(classes) else None


def head_size(head: Any) -> int:
    """The number of a head's outputs."""
    return int(head.out_features)
