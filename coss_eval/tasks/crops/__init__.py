"""Accuracy and stability on crops of the images."""

from __future__ import annotations

from dataclasses import dataclass

from coss_eval.errors import UsageError, unknown_name
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import Floats, Integers, Words

# share of the margins (height left over, width left over) that lies above and left of the crop
POSITIONS = {
    "centre": (0.5, 0.5),
    "top left": (0.0, 0.0),
    "top right": (0.0, 1.0),
    "bottom left": (1.0, 0.0),
    "bottom right": (1.0, 1.0),
}


@dataclass(frozen=True)
class CropsOptions:
    """Accuracy and stability of the representation on crops of the test images (Aubret et al. 2025).

    Networks and classifier stay as they are; crops keep the image's shape and are resized to the input's size. Beside
    the accuracy stands the stability: the cosine between the global representations of the crop and of the full image,
    after the mean over the full test images is subtracted from both (as ReLU alone would make it high).
    """

    areas: Floats = (0.08, 0.2, 0.4, 0.6, 0.8)
    "Shares of the image's area that centre crops cover."
    positions: Words = tuple(POSITIONS)
    "Places of a crop of --area."
    scales: Floats = (0.25, 0.5, 0.75, 1.5)
    "Of the whole image, relative to the side of the network's input; a network of one fixed size takes those below 1."
    counts: Integers = (1, 2, 4, 8)
    "Numbers of crops of --area at random places, the same for every network, whose representations are averaged."
    area: float = 0.25
    "Share of the image's area, of the crops whose position or number varies."

    def __post_init__(self) -> None:
        for area in (*self.areas, self.area):
            if not 0 < area <= 1:
                raise UsageError(f"a crop covers more than 0 and at most 1 of the image's area, got {area:g}")
        for position in self.positions:
            if position not in POSITIONS:
                raise unknown_name("position of a crop", position, POSITIONS)
        if any(scale <= 0 for scale in self.scales):
            raise UsageError(f"scales of the resolution must be above 0, got {list(self.scales)}")
        if any(count < 1 for count in self.counts):
            raise UsageError(f"counts of pooled crops must be at least 1, got {list(self.counts)}")


ENTRY = TaskEntry(
    name="crops",
    about="accuracy and stability of the representation on crops: area, position, resolution, number",
    source="Aubret et al. 2025",
    options=CropsOptions,
    home="coss_eval.tasks.crops.task:Crops",
    order=50,
    quick={"areas": (0.08, 0.4), "positions": ("centre", "top left"), "scales": (0.5,), "counts": (1, 4)},
    small={"areas": (0.4,), "positions": ("centre",), "scales": (0.5,), "counts": (2,)},
)
