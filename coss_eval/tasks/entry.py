"""What the command line and reports know of a task before it is imported: torch-free."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError
from coss_eval.runtime.imports import imported

if TYPE_CHECKING:
    from coss_eval.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task in the registry.

    ``options`` is a dataclass whose fields are the task's options and its command's flags, and whose docstring is the
    command's help. ``home`` is the task's class, or where it is: "package.module:Class". ``order`` is its place in
    lists and reports. ``quick`` and ``small`` are options for the demonstration of `coss-eval quickstart` and for the
    few images of `coss-eval check`.
    """

    name: str
    about: str
    source: str = ""
    options: type
    home: str | type[Task]
    order: int = 100
    quick: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Any) -> TaskEntry:
        """The entry of a task's class, from the class itself. Raises UsageError for what is no task."""
        from coss_eval.tasks.task import Task

        if not (isinstance(task, type) and issubclass(task, Task)):
            raise UsageError(f"a task is a subclass of coss_eval.tasks.task.Task, got {task!r}")
        lacks = sorted(getattr(task, "__abstractmethods__", ())) + ["name"] * (not hasattr(task, "name"))
        if lacks:
            raise UsageError(f"the task {task.__name__} lacks {' and '.join(lacks)}")
        about = (inspect.getdoc(task) or "").partition("\n")[0].rstrip(".")
        return cls(name=task.name, about=about, options=task, home=task, quick=task.quick, small=task.small)

    @property
    def option_names(self) -> tuple[str, ...]:
        """What ``make`` takes."""
        return tuple(getattr(self.options, "__dataclass_fields__", ()))

    def task_class(self) -> type[Task]:
        """The task's class, imported now."""
        found: type[Task] = imported(self.home, "task", "class") if isinstance(self.home, str) else self.home
        return found

    def make(self, **options: Any) -> Task:
        """The task with these options, the others at their defaults. Raises UsageError where one has none."""
        task: Any = self.task_class()
        try:
            inspect.signature(task).bind(**options)
        except TypeError as error:
            raise UsageError(f"task {self.name}: its options need defaults ({error})") from error
        made: Task = task(**options)
        return made
