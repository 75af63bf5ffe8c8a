"""From what a format has read to a Dataset: labels checked, ids given, one decision on the native size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coss_eval.data.choose import Ints, sample_ids
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import Images
from coss_eval.data.split import Split
from coss_eval.errors import CossError


@dataclass(frozen=True)
class Part:
    """What a format knows of one split: its images and a label each."""

    images: Images
    labels: Sequence[int] | Ints
    notes: tuple[str, ...] = ()  # lines for a person: what was left out, what else there is


def assemble(
    name: str, classes: Sequence[str], train: Part | None, test: Part, titles: dict[str, str] | None = None
) -> Dataset:
    """A Dataset of its parts; both are native only where both have the same one small size."""
    for which, part in (("train", train), ("test", test)):
        if part is not None:
            _check_labels(f"the {which} split of {name}", part, len(classes))
    sizes = {part.images.common_size() for part in (train, test) if part is not None}
    native = next(iter(sizes)) if len(sizes) == 1 else None

    def split(which: str, part: Part) -> Split:
        labels = np.asarray(part.labels, np.int64)
        ids = sample_ids(part.images.keys.to_pylist())
        return Split(which, tuple(classes), part.images, np.arange(len(labels)), labels, ids, native)

    parts = [(which, part) for which, part in (("train", train), ("test", test)) if part is not None]
    notes = [line for which, part in parts for line in (*part.notes, *part.images.remarks(which, native is not None))]
    if native is None and None not in sizes:
        notes.append("train and test images are of two sizes, so that both are read at the model's input size")
    known = {key: title for key, title in (titles or {}).items() if key in set(classes)}
    return Dataset(name, split("train", train) if train else None, split("test", test), known, notes=tuple(notes))


def _check_labels(split: str, part: Part, classes: int) -> None:
    labels = np.asarray(part.labels, np.int64)
    if not len(labels):
        raise CossError(f"{split} holds no images; expected at least one")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise CossError(
            f"{len(wrong)} of {len(labels):,} labels of {split} are out of range: expected 0 to {classes - 1}, "
            f"got {labels[wrong[0]]} for {part.images.keys[int(wrong[0])].as_py()}"
        )
