"""A ready-made corruption benchmark as a dataset: one set of photographs, stored once a corruption and severity."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from coss_eval.data.choose import Ints
from coss_eval.data.dataset import Dataset
from coss_eval.data.images import Images
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError

Open = Callable[[str, int], Images]


@dataclass(frozen=True, eq=False)
class Benchmark(Dataset):
    """ImageNet-C, Tiny-ImageNet-C, CIFAR-10-C or a copy that ``coss-eval corruptions --write`` made.

    ``test`` says which photographs, in which order; its own pixels are those of the first condition. ``severities``
    has those that each corruption is stored at, ``made`` how the pixels came about, where that is known. A benchmark
    has no clean images: ``train`` and ``clean`` are those of the dataset it was made from, given by ``with_clean``.
    """

    severities: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    open: Open | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    clean: Split | None = None
    _fingerprints: dict[tuple[str, int], str] = field(default_factory=dict, init=False, repr=False)

    def condition(self, name: str, severity: int) -> Split:
        """The photographs of ``test`` under one corruption at one severity; UsageError where it is not stored."""
        if name not in self.severities:
            raise UsageError(f"{self.name} holds no {name}; it has {', '.join(self.severities)}")
        if severity not in self.severities[name] or self.open is None:
            stored = ", ".join(map(str, self.severities[name]))
            raise UsageError(f"{self.name} holds no {name} at severity {severity}; it has {stored}")
        return replace(self.test, images=self.open(name, severity))

    def fingerprint(self, name: str, severities: Sequence[int]) -> str:
        """Hash of a corruption's files at these severities: of which images, and of all of their content."""
        for severity in severities:
            if (name, severity) not in self._fingerprints:
                self._fingerprints[name, severity] = self.condition(name, severity).fingerprint
        text = " ".join(f"{severity}:{self._fingerprints[name, severity]}" for severity in severities)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def clean_test(self) -> Split | None:
        """The clean photographs of ``test`` in its order; where ids do not tell which, as many of the clean split."""
        if self.clean is None:
            return None
        if not np.isin(self.test.ids, self.clean.ids).all():
            return self.clean if self.test.limit is None else self.clean.limited(self.test.limit)
        order = np.argsort(self.clean.ids, kind="stable")
        places = order[np.searchsorted(self.clean.ids[order], self.test.ids)]
        return replace(self.clean.subset(places), limit=self.test.limit)

    def restricted(self, classes: Sequence[str]) -> Benchmark:
        whole = super().restricted(classes)
        assert isinstance(whole, Benchmark)
        return replace(whole, clean=None if self.clean is None else self.clean.restricted(classes))


def with_clean(benchmark: Benchmark, clean: Dataset) -> Benchmark:
    """The benchmark with the dataset it was made from: a training split for probes, and the clean test images.

    Photographs are found again by their class and file name, or by their place where both have the same labels in the
    same order; they then carry the clean dataset's ids, so that numbers of both are paired. Raises CossError where
    the classes are not the same.
    """
    if isinstance(clean, Benchmark):
        raise UsageError(
            f"--clean must be the clean dataset that {benchmark.name} was made from, got another benchmark"
        )
    test = _named_as(benchmark, clean)
    clean = clean.restricted(test.classes)
    ids = _ids_in(clean.test, test)
    test = test if ids is None else replace(test, ids=ids)
    titles = benchmark.class_titles or clean.class_titles
    return replace(benchmark, train=clean.train, test=test, clean=clean.test, class_titles=titles)


def with_training(shifted: Dataset, clean: Dataset) -> Dataset:
    """A test set of another distribution (ImageNet-A, -R, -V2, -Sketch) with the dataset whose classes it has.

    That gives the training split for probes, of the shared classes only; a head's logits are restricted to them by
    their names. Raises UsageError where the set has a training split of its own, CossError for other classes.
    """
    if shifted.train is not None:
        raise UsageError(f"{shifted.name} has clean images of its own, and a training split; leave --clean out")
    test = _named_as(shifted, clean)
    shared = clean.restricted(test.classes)
    note = f"test images of another distribution than the training images, which are {clean.name}'s"
    if len(test.classes) < len(clean.classes):
        note += f", of {len(test.classes)} of its {len(clean.classes)} classes"
    titles = shifted.class_titles or clean.class_titles
    return replace(shifted, train=shared.train, test=test, class_titles=titles, notes=(*shifted.notes, note))


def _named_as(data: Dataset, clean: Dataset) -> Split:
    """The test split with its classes by the clean dataset's names, where its own are their numbers."""
    test = data.test
    numbers = [int(name) for name in test.classes] if all(name.isdecimal() for name in test.classes) else []
    if numbers and max(numbers) < len(clean.classes) and not set(test.classes) <= set(clean.classes):
        test = replace(test, classes=clean.classes, labels=np.array(numbers, np.int64)[test.labels])
    unknown = [name for name in test.classes if name not in clean.classes]
    if unknown:
        raise CossError(
            f"{len(unknown)} of {len(test.classes)} classes of {data.name} are not in {clean.name}: "
            f"{', '.join(unknown[:3])}; give the dataset it was made from"
        )
    return test


def _ids_in(clean: Split, test: Split) -> Ints | None:
    """The id that each photograph of ``test`` has in ``clean``; None where not all are found."""
    if np.isin(test.ids, clean.ids).all():
        return None
    known = {(int(label), _stem(key)): id_ for label, key, id_ in zip(clean.labels, clean.keys, clean.ids, strict=True)}
    if len(known) == len(clean):
        found = [known.get((int(label), _stem(key))) for label, key in zip(test.labels, test.keys, strict=True)]
        if None not in found:
            return np.array(found, np.int64)
    return clean.ids if np.array_equal(clean.labels, test.labels) else None


def _stem(key: str) -> str:
    return PurePosixPath(key).stem
