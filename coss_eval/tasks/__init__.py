"""The tasks by name; each module binds one family of measurements to a classifier and batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from coss_eval.errors import unknown_name

if TYPE_CHECKING:
    from coss_eval.tasks.task import Task

NAMES = {
    "probe": "linear probe, few-label probes and kNN on the frozen global representation",
    "corruptions": "accuracy under 19 image corruptions at 5 severities",
    "attacks": "robust accuracy under FGSM and PGD over rising eps",
    "internal": "accuracy while channels or locations are masked inside the network",
    "crops": "accuracy and stability of the representation on crops: area, position, resolution, number",
    "redundancy": "how alike the local representations of an image are",
}


def task_class(name: str) -> type[Task]:
    """The class of the task called ``name``."""
    if name not in NAMES:
        raise unknown_name("task", name, NAMES)
    found: type[Task] = getattr(import_module(f"coss_eval.tasks.{name}.task"), name.capitalize())
    return found
