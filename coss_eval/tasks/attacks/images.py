"""Which images a cell attacks, and how many of them the checks use."""

from __future__ import annotations

from typing import Any

from coss_eval.data.split import Split
from coss_eval.tasks.task import Subject


def attacked_split(subject: Subject, params: dict[str, Any]) -> Split:
    """The test images that a cell attacks."""
    split = subject.data.test
    return split if params["images"] is None else split.limited(params["images"], params["seed"])


def bounded_note(split: Split, subject: Subject) -> list[str]:
    """A line that says so where not all test images are attacked."""
    of = len(subject.data.test)
    return [f"attacks use {len(split)} of {of} test images, balanced over classes"] if len(split) < of else []


def checked_count(params: dict[str, Any], images: int) -> int:
    """How many of ``images`` attacked ones the checks use: a fifth, so that they never cost more than the attack."""
    most: int = params["checked_images"]
    return min(most, -(-images // 5))
