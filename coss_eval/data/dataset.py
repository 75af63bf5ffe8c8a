"""What a dataset is to all others: a name, a training split where there is one, and a test split. Torch-free."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Self

from coss_eval.errors import shown
from coss_eval.runtime.live import facts_html

if TYPE_CHECKING:
    from coss_eval.data.split import Split

SHOWN, SIDE = 24, 64  # images in a notebook, and their pixels a side where they have no size of their own


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

    def _repr_html_(self) -> str:
        """In a notebook: the facts, and test images of as many classes as fit on one small PNG."""
        train = {} if self.train is None else {"training images": f"{len(self.train):,}"}
        titles = [self.class_titles.get(name, name) for name in self.classes]
        facts = {"test images": f"{len(self.test):,}", "classes": f"{len(titles):,}: {shown(titles, 10)}"}
        notes = {f"note {number}": note for number, note in enumerate(self.notes, 1)}
        png = b64encode(self._grid()).decode()
        image = f'<img src="data:image/png;base64,{png}" alt="test images of {escape(self.name)}">'
        return facts_html(f"{type(self).__name__} {self.name}", {**train, **facts, **notes}) + image

    def _grid(self) -> bytes:
        """Test images, balanced over classes, eight beside one another and at most SHOWN, as a PNG file."""
        import numpy as np
        from PIL import Image

        from coss_eval.data.batches import Geometry

        few = self.test.limited(min(SHOWN, len(self.test)))
        batches = few.batches(Geometry(size=SIDE), workers=0, skip_bad_images=True)
        images = [image.permute(1, 2, 0).numpy() for batch in batches for image in batch.images]  # (H, W, 3)
        rows = [images[i : i + 8] for i in range(0, len(images), 8)]
        blank = np.full_like(images[0], 255) if images else np.full((1, 1, 3), 255, np.uint8)
        rows = [row + [blank] * (min(8, len(images)) - len(row)) for row in rows] or [[blank]]
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(buffer, "PNG")
        return buffer.getvalue()

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
