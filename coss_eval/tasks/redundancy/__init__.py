"""How alike the local representations of an image are."""

from __future__ import annotations

from dataclasses import dataclass

from coss_eval.tasks.entry import TaskEntry


@dataclass(frozen=True)
class RedundancyOptions:
    """How alike the local representations of an image are, beside an untrained network's (Aubret et al. 2025).

    Similarity within and between images, and the share that the image mean explains. Padding, low rank and overlapping
    receptive fields move them in any network, so the untrained row is always there, the mean of each grid position is
    taken off, and the border, and pairs whose fields overlap, have rows of their own.
    """

    site: str = "prepool"
    "Where the local representations are taken: stage1, stage2, ..., prepool."
    probe: bool = False
    "Also read every location, a few of them, and some dimensions by the global representation's linear probe."


ENTRY = TaskEntry(
    name="redundancy",
    about="how alike the local representations of an image are",
    source="Aubret et al. 2025",
    options=RedundancyOptions,
    home="coss_eval.tasks.redundancy.task:Redundancy",
    order=60,
)
