"""Accuracy under image corruptions: one cell a corruption, with all its severities; made here or read from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coss_eval.corruptions import corrupt, resolve_table
from coss_eval.corruptions.registry import MIN_SIDE
from coss_eval.data.batches import Batch
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.choose import Ints
from coss_eval.errors import UsageError
from coss_eval.models.classifier import to_float
from coss_eval.probes.calibration import calibration, judge, judged
from coss_eval.runtime.background import in_background
from coss_eval.runtime.device import seconds_of
from coss_eval.store import Cell
from coss_eval.tasks.corruptions import CorruptionsOptions
from coss_eval.tasks.corruptions.files import file_batches, file_cells
from coss_eval.tasks.task import Result, Subject, Task, chance


@dataclass(frozen=True)
class Corruptions(CorruptionsOptions, Task):
    """Every network sees the same corrupted pixels; see CorruptionsOptions. One cell per corruption, and a clean one.

    On a Benchmark the pixels are read from its files as they are.
    """

    name: ClassVar[str] = "corruptions"
    reads_benchmarks: ClassVar[bool] = True

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        if isinstance(subject.data, Benchmark):
            if (self.backend, self.flavour, self.table) != ("native", "imagecorruptions", None):
                raise UsageError(
                    f"the pixels of {subject.data.name} are made already: no backend, flavour or table applies"
                )
            return file_cells(self.name, subject.data, subject, self.named, self.severities)
        table = resolve_table(self.table, subject.image_size, self.backend)
        shared = {"backend": self.backend, "flavour": self.flavour, "table": table, "seed": seed}
        clean = Cell(self.name, {"corruption": "clean"})
        own = {name: {} if found.code is None else {"code": found.code} for name, found in self.corruptions.items()}
        small = self._too_large_for(subject)
        return [clean] + [
            Cell(self.name, {"corruption": name, "severities": list(self.severities), **shared, **own[name]})
            for name in self.corruptions
            if name not in small
        ]

    def left_out(self, subject: Subject) -> list[str]:
        small = self._too_large_for(subject)
        height, width = subject.image_size
        line = f"images of {height} x {width} px are too small for {', '.join(small)} (at least {MIN_SIDE})"
        return [line] if small else []

    def _too_large_for(self, subject: Subject) -> list[str]:
        """The corruptions whose kernels, maps or textures do not fit into these images; none where they are made."""
        if isinstance(subject.data, Benchmark):
            return []
        least = MIN_SIDE if self.backend == "reference" else 1
        side = min(subject.image_size)
        return [name for name, found in self.corruptions.items() if max(found.min_side, least) > side]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        return len(subject.data.test) * len(cell.params.get("severities", [0]))

    def overhead(self, cell: Cell, subject: Subject) -> float:
        """Corrupting, timed on a few images; it runs beside the forward passes, so this errs on the long side."""
        if cell.params["corruption"] == "clean" or isinstance(subject.data, Benchmark):
            return 0.0
        split, device = subject.data.test, subject.compute.device
        few = 2 if device.type == "cpu" else 64  # a GPU does 64 in the time of two
        batch = next(subject.batches(split.subset(range(min(few, len(split))))))

        def corrupt_all() -> None:
            for severity in cell.params["severities"]:
                self._corrupt(cell, batch, severity)

        return seconds_of(corrupt_all, device) / len(batch.ids) * len(split)

    def measure(self, cell: Cell, subject: Subject) -> Result:
        return next(self.run(cell, [subject]))

    def run(self, cell: Cell, subjects: Sequence[Subject]) -> Iterator[Result]:
        """Every subject sees the same corrupted pixels: each batch is corrupted once, beside the forward passes."""
        name, severities = cell.params["corruption"], cell.params.get("severities", [0])
        ids: dict[int, list[Ints]] = {severity: [] for severity in severities}
        seen_by: dict[tuple[int, int], list[NDArray[np.float32]]] = {
            (index, severity): [] for index in range(len(subjects)) for severity in severities
        }
        for batch, severity, images in in_background(self._corrupted(cell, subjects[0])):
            ids[severity].append(batch.ids.cpu().numpy())
            for index, subject in enumerate(subjects):
                seen_by[index, severity].append(_judge(subject, images, batch.labels))
        seen = {severity: np.concatenate(ids[severity]) for severity in severities}
        common = reduce(np.intersect1d, seen.values())  # a file may be unreadable at one severity only
        for index, subject in enumerate(subjects):
            found = {
                severity: judged(np.concatenate(seen_by[index, severity])[np.isin(seen[severity], common)])
                for severity in severities
            }
            conditions = {severity: {"corruption": name, "severity": severity} for severity in severities}
            result = Result.of_verdicts(
                "accuracy",
                seen[severities[0]][np.isin(seen[severities[0]], common)],
                ((conditions[severity], found[severity].correct) for severity in severities),
            )
            for severity in severities:
                result.measurements += calibration(found[severity], conditions[severity])
            if name == "clean":
                result.measurements.append(chance(subject, len(common), corruption=name, severity=0))
            yield result

    def _corrupted(self, cell: Cell, subject: Subject) -> Iterator[tuple[Batch, int, Tensor]]:
        if isinstance(subject.data, Benchmark):
            for severity, batch in file_batches(cell, subject.data, subject):
                yield batch, severity, batch.images
            return
        for batch in subject.batches():
            for severity in cell.params.get("severities", [0]):
                yield batch, severity, self._corrupt(cell, batch, severity)

    def _corrupt(self, cell: Cell, batch: Batch, severity: int) -> Tensor:
        params = cell.params
        if params["corruption"] == "clean":
            return batch.images
        how = {name: params[name] for name in ("seed", "table", "flavour", "backend")}
        return corrupt(batch.images, self.corruptions[params["corruption"]], severity, batch.ids, **how)


@torch.inference_mode()
def _judge(subject: Subject, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
    return np.asarray(judge(subject.classifier(to_float(images)), labels).cpu())
