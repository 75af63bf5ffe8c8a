"""What a dataset is to all others: a name, a training split where there is one, and a test split. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

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

    def restricted(self, classes: Sequence[str]) -> Self:
        """The images of these classes alone, labelled by their place among them."""
        train = None if self.train is None else self.train.restricted(classes)
        return replace(self, train=train, test=self.test.restricted(classes))
