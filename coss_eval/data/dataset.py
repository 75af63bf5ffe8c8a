"""What a dataset is to all others: a name, a training split where there is one, and a test split. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coss_eval.data.split import Split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A name, its training split where there is one, and its test split, which all numbers are about.

    ``class_titles`` maps classes to names for people, where the dataset brings them (classes.json, words.txt).
    """

    name: str
    train: Split | None
    test: Split
    class_titles: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes
