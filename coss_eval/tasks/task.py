"""What a task is: it lists the cells it consists of and measures one cell on one or several subjects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from coss_eval.data.batches import Batch
from coss_eval.data.choose import Bools, Ints
from coss_eval.data.open import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError
from coss_eval.models.classifier import Classifier
from coss_eval.models.heads import resolve_head
from coss_eval.models.model import Model
from coss_eval.probes import extract_known, known_classifier
from coss_eval.probes.features import Features, image_size
from coss_eval.runtime.device import Compute
from coss_eval.statistics import wilson
from coss_eval.store import Cell, Measurement, column_name

SplitName = Literal["train", "test"]


@dataclass
class Subject:
    """One model on one dataset: what a task measures."""

    model: Model
    data: Dataset
    compute: Compute
    refusal: CossError | None = field(default=None, repr=False)  # why there is no classifier, once that is known

    @cached_property
    def classifier(self) -> Classifier:
        """The model's own head where its class names match the dataset's, else a linear probe fitted on train."""
        if self.refusal is not None:  # it may have cost a pass over the training images to see
            raise self.refusal
        # whoever asks first: weights made in inference mode could not be attacked later
        with torch.inference_mode(False):
            try:
                return known_classifier(self.model, self.data, self.compute)
            except CossError as error:
                self.refusal = error
                raise

    def features(self, split: Split) -> Features:
        """The global representations of a split's images, cached."""
        return extract_known(self.model, split, self.compute)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pixels that corruptions act on and eps counts in."""
        return image_size(self.model, self.data.test)

    @property
    def geometry(self) -> dict[str, Any]:
        return self.data.test.protocol(self.model.preprocessing.geometry)

    def head_protocol(self) -> dict[str, Any]:
        """Where the logits come from, as far as a number depends on it; known before any probe is fitted."""
        choice = resolve_head(self.model, self.data.classes, self.model.head_choice)
        if choice.use_own:
            return {"head": "own"} if choice.class_map is None else {"head": "own", "class_map": choice.class_map}
        return {"head": "probe", "train": None if self.data.train is None else self.data.train.fingerprint}

    def batches(self, split: Split | None = None, *, batch_size: int | None = None) -> Iterator[Batch]:
        """Batches of the test split (or another) in this model's geometry, on the device."""
        split = self.data.test if split is None else split
        batch_size = batch_size or self.compute.batch_size
        for batch in split.batches(self.model.preprocessing.geometry, batch_size=batch_size):
            yield Batch(*(tensor.to(self.compute.device, non_blocking=True) for tensor in batch))


@dataclass
class Result:
    """What a task found in one cell. ``samples``: "id" and one verdict column a condition, for paired tests."""

    measurements: list[Measurement]
    samples: dict[str, Bools | Ints] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_verdicts(cls, metric: str, ids: Ints, verdicts: Iterable[tuple[dict[str, Any], Bools]]) -> Result:
        """Proportions with Wilson intervals from (condition, correct (N,)) pairs, the verdicts kept by sample id."""
        result = cls([], {"id": ids})
        for condition, correct in verdicts:
            result.measurements.append(proportion(metric, correct, **condition))
            result.samples[column_name(metric, condition)] = correct
        return result


class Task(ABC):
    """A family of measurements. Its fields are its options; they go into the cells' parameters.

    One from outside the package needs a name, a docstring whose first line says what it measures, ``cells`` and
    ``measure``; `--tasks module:Class` runs it, and ``coss_eval.tasks.register`` makes its name known. ``quick`` and
    ``small`` are options for a demonstration, and for a check on a few images. Its source code is in its cells' keys,
    or in its place the class's ``version`` (text or a number, to be raised when its numbers change) where it has one.
    """

    name: ClassVar[str]
    reads_benchmarks: ClassVar[bool] = False  # whether it can use images that are stored corrupted
    quick: ClassVar[Mapping[str, Any]] = {}
    small: ClassVar[Mapping[str, Any]] = {}

    @property
    def uses_head(self) -> bool:
        """Whether its numbers depend on the classifier; a class attribute where that does not depend on options."""
        return True

    @abstractmethod
    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        """The cells to compute; cheap, no image is read."""

    @abstractmethod
    def measure(self, cell: Cell, subject: Subject) -> Result:
        """One cell on one subject."""

    def impossible(self, subject: Subject) -> str | None:
        """Why this task has no number for the subject, whatever the cell; None where it has."""
        if not self.uses_head or subject.data.train is not None or subject.head_protocol()["head"] == "own":
            return None
        return f"{subject.data.name} has no training split to fit a probe on"

    def left_out(self, subject: Subject) -> list[str]:
        """Lines on what ``cells`` leaves out for this subject, whose images do not allow it."""
        return []

    def reads(self, subject: Subject) -> list[SplitName]:
        """The splits whose features (``Subject.features``) or probe its cells read, which processes make together."""
        return ["train"] if self.uses_head and subject.head_protocol()["head"] == "probe" else []

    def run(self, cell: Cell, subjects: Sequence[Subject]) -> Iterator[Result]:
        """One cell on several subjects of the same data and geometry, in their order."""
        for subject in subjects:
            yield self.measure(cell, subject)

    def forwards(self, cell: Cell, subject: Subject) -> float:
        """The cell's cost in forward passes over single images, for the estimate of time (backward counts as two)."""
        return float(len(subject.data.test))

    def overhead(self, cell: Cell, subject: Subject) -> float:
        """Seconds of work beside the forward passes, for the estimate of time."""
        return 0.0


def chance(subject: Subject, n: int, **condition: Any) -> Measurement:
    """The accuracy of guessing, 1 / classes, which "kept" in reports counts from: beside the accuracies of a cell.

    Of an unbalanced test split a constant answer may have more; the number of classes is what all splits share.
    """
    return Measurement("chance", 1 / len(subject.data.classes), n, condition=condition)


def proportion(metric: str, correct: Bools, **condition: Any) -> Measurement:
    """The share of True in ``correct`` with its Wilson interval."""
    successes, n = int(correct.sum()), len(correct)
    low, high = wilson(successes, n)
    return Measurement(metric, successes / n, n, low, high, condition)
