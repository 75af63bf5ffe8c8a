"""The corruptions task on a ready-made benchmark: its cells and batches, from files in place of pixels made here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coss_eval.corruptions.names import NAMES, SEVERITIES
from coss_eval.data.batches import Batch
from coss_eval.data.benchmark import Benchmark
from coss_eval.errors import UsageError
from coss_eval.models.heads import resolve_head
from coss_eval.models.zoo import imagenet_wnids
from coss_eval.store import Cell
from coss_eval.tasks.task import Subject

CLEAN = "clean"


def file_cells(task: str, data: Benchmark, subject: Subject, names: Sequence[str], levels: Sequence[int]) -> list[Cell]:
    """A cell a corruption, and one for the clean images where they were given.

    All carry pixels="files" and the files' fingerprint, so that no number of theirs is taken for one of images that
    were corrupted here, nor for one of other files. All the published names mean those that the benchmark has, by
    whatever name, and all severities those that it has.
    """
    _check_head(data, subject)
    every = [name for name in (*names, *data.severities) if name in data.severities]
    wanted = list(dict.fromkeys(every)) if tuple(names) == NAMES else list(names)
    cells: list[Cell] = []
    clean = data.clean_test()
    if clean is not None:
        geometry = clean.protocol(subject.model.preprocessing.geometry)
        shared = {"pixels": "files", "fingerprint": clean.fingerprint, "geometry": geometry}
        cells.append(Cell(task, {"corruption": CLEAN, **shared}))
    for name in wanted:
        stored = [level for level in levels if level in data.severities.get(name, ())]
        own = stored if stored and tuple(levels) == SEVERITIES else list(levels)  # all means those that there are
        shared = {"pixels": "files", "fingerprint": data.fingerprint(name, own), **made(data)}
        cells.append(Cell(task, {"corruption": name, "severities": own, **shared}))
    return cells


def file_batches(cell: Cell, data: Benchmark, subject: Subject) -> Iterator[tuple[int, Batch]]:
    """(severity, batch) of a cell, one severity after the other; the clean images have severity 0."""
    for severity in cell.params.get("severities", [0]):
        clean = cell.params["corruption"] == CLEAN
        split = data.clean_test() if clean else data.condition(cell.params["corruption"], severity)
        for batch in subject.batches(split):
            yield severity, batch


def made(data: Benchmark) -> Mapping[str, Any]:
    """How the files' pixels were made, as far as it is known: of our own copies, and of the published ImageNet-C."""
    if data.made:
        known = ("source", "table", "flavour", "backend", "seed")
        return {name: data.made[name] for name in known if name in data.made}
    if data.classes == imagenet_wnids() and data.test.native_size == (224, 224):
        return {"source": "imagenet", "table": "imagenet"}
    return {}


def _check_head(data: Benchmark, subject: Subject) -> None:
    decision = resolve_head(subject.model, data.classes)
    if not decision.use_own and data.train is None:
        raise UsageError(
            f"{data.name} holds corrupted test images only, and {subject.model.name} needs training images for "
            f"{decision.why}; add --clean DATA, the dataset it was made from"
        )
