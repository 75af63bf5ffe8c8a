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
    ``notes`` are lines on how it is read where that is not the usual way.
    """

    name: str
    train: Split | None
    test: Split
    class_titles: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __repr__(self) -> str:
        train = "no training" if self.train is None else f"{len(self.train):,} training"
        counts = f"{train} and {len(self.test):,} test images, {len(self.classes)} classes"
        return f"{type(self).__name__}({self.name}: {counts})"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes

    def warnings(self) -> list[str]:
        """What a reader of its numbers must know: the notes, and test images that are training images too."""
        repeated = self.repeated()
        if not repeated:
            return list(self.notes)
        first, others = next(iter(repeated.items()))
        count = f"{len(repeated)} of {len(self.test):,} test images"
        return [*self.notes, f"{count} are training images too, byte for byte: {first} is {others}"]

    def repeated(self) -> dict[str, str]:
        """Test images (their keys) with the same bytes as a training image; looked for where both have been read."""
        splits = (self.train, self.test)
        if self.train is None or any(split is None or split.known_fingerprint is None for split in splits):
            return {}
        train, test = self.train.short_digests(), self.test.short_digests()
        order = train.argsort()
        places = order[train[order].searchsorted(test).clip(max=len(train) - 1)]
        return {
            self.test.key(int(here)): self.train.key(int(places[here])) for here in (train[places] == test).nonzero()[0]
        }

    def refuse_changed(self) -> None:
        """UsageError where files have changed since they were read through this dataset."""
        for split in (self.train, self.test):
            if split is not None:
                split.refuse_changed()

    def left_out(self) -> list[str]:
        """A line for each split of which --skip-bad-images has left images out so far."""
        splits = (self.train, self.test)
        return [line for split in splits if split is not None and (line := split.left_out()) is not None]

    def restricted(self, classes: Sequence[str]) -> Self:
        """The images of these classes alone, labelled by their place among them."""
        train = None if self.train is None else self.train.restricted(classes)
        return replace(self, train=train, test=self.test.restricted(classes))
