"""How alike the local representations of an image are, beside what an untrained network of the same kind shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from torch import Tensor, nn

from coss_eval.models.classifier import Classifier, to_float
from coss_eval.redundancy import measure
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.task import Result, Subject, Task


@dataclass(frozen=True)
class Redundancy(Task):
    """Similarity within and between images and the share that the image mean explains, of the locals at ``site``.

    Padding, low rank and overlapping receptive fields move it in any network, so the untrained row is always there.
    """

    name: ClassVar[str] = "redundancy"
    uses_head: ClassVar[bool] = False

    site: str = "prepool"

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        trained = Cell(self.name, {"site": self.site, "weights": "trained"})
        if subject.model.architecture is None:  # raw pixels have no weights; how a network was made may not be known
            return [trained]
        return [trained, Cell(self.name, {"site": self.site, "weights": "untrained", "seed": seed})]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        return 2.0 * len(subject.data.test)

    def measure(self, cell: Cell, subject: Subject) -> Result:
        params = cell.params
        model = subject.model if params["weights"] == "trained" else subject.model.untrained(params["seed"])
        backbone = model.backbone.to(subject.settings.device)
        normalise = Classifier(backbone, nn.Identity(), model.preprocessing).to(subject.settings.device).normalise

        def batches() -> Iterator[Tensor]:
            for batch in subject.batches():
                yield normalise(to_float(batch.images))

        table = measure(backbone, batches, site=params["site"])
        return Result([_measurement(row, params["site"], params["weights"]) for _, row in table.iterrows()])


def _measurement(row: pd.Series[Any], site: str, weights: str) -> Measurement:
    low, high = (None if pd.isna(row[bound]) else float(row[bound]) for bound in ("low", "high"))
    return Measurement(row["metric"], float(row["value"]), int(row["n"]), low, high, {"site": site, "weights": weights})
