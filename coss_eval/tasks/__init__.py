"""The tasks: one registry that commands, lists, checks and reports iterate over. Importing it imports no torch.

A built-in task is a folder here, whose __init__.py has its options and its ENTRY, and whose report.py has its REPORT,
what reports show of it. One from outside the package is a subclass of Task: named as "package.module:Class" wherever a
task's name is taken, or registered.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.imports import imported
from coss_eval.tasks.entry import TaskEntry

if TYPE_CHECKING:
    from coss_eval.tasks.task import Task

_REGISTERED: dict[str, TaskEntry] = {}


@cache
def built_in() -> tuple[TaskEntry, ...]:
    """The package's own tasks in the order of a report."""
    folders = [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]
    found: list[TaskEntry] = [import_module(f"{__name__}.{folder}").ENTRY for folder in folders]
    return tuple(sorted(found, key=lambda entry: entry.order))


def entries() -> dict[str, TaskEntry]:
    """All tasks by name: the built-in ones, then those registered."""
    return {entry.name: entry for entry in built_in()} | _REGISTERED


def entry(name: str) -> TaskEntry:
    """The task called ``name``, or the class that "package.module:Class" names, which is registered thereby."""
    if ":" in name:
        return register(imported(name, "task", "class"))
    known = entries()
    if name not in known:
        raise unknown_name("task", name, known)
    return known[name]


def task_class(name: str) -> type[Task]:
    """The class of the task called ``name``, or named as "package.module:Class"."""
    return entry(name).task_class()


def register(task: TaskEntry | type[Task]) -> TaskEntry:
    """Make a task from outside the package known by its name; its entry. A class of the same name is replaced.

    Raises UsageError for a name that a built-in task has.
    """
    made = task if isinstance(task, TaskEntry) else TaskEntry.of(task)
    if made.name in {entry.name for entry in built_in()}:
        raise UsageError(f"there is a task called {made.name} in the package: give yours another name")
    _REGISTERED[made.name] = made
    return made
