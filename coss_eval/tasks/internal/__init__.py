"""Accuracy while the network is damaged inside."""

from __future__ import annotations

from dataclasses import dataclass

from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import Fractions, Words


@dataclass(frozen=True)
class InternalOptions:
    """Accuracy while the network is damaged inside: masked, made noisy, rounded, or unit after unit ablated.

    Masking as in Aubret et al. 2025, ablation as in Morcos et al. 2018. Each image has the same masks at every level.
    Noise is relative to the channels' deviation on training images, and left out where there are none. What is drawn
    at each location averages out under pooling, redundant or not, so masked locations and noise run with their
    controls, channel and noise-shared, which are alike at all locations. weight-noise and weight-quantised damage the
    whole network's weights, once for all --sites. A kind that means nothing at a site (locations of a vector) is left
    out there, and so are sites with other locations than those that --match-locations matches.
    """

    sites: Words = ()
    "stage1, stage2, ..., prepool, global [default: all but global]."
    kinds: Words = ("channel", "location", "noise", "noise-shared")
    "element, channel, location, noise, noise-shared, ablation, quantised, weight-noise, weight-quantised, or all."
    levels: Fractions = None
    """Rising: shares masked in [0, 1), of units ablated in [0, 1], noise relative to the channels' or weights'
    deviation, or steps of a grid as a share of the range (1/15 is 4 bits) [default: those of each kind]."""
    seeds: int = 5
    "Number of random masks per image, or of draws, from the seed on."
    rescale: bool = False
    "Divide what is kept by the share that is kept."
    match_locations: int | None = None
    """Before pooling, compare networks on this number of locations per image: independent noise averages out over
    more."""
    surrogate: float | None = None
    """Before pooling, mix an image's locations with their mean until their redundancy is this, that of another network:
    what redundancy alone does, since nothing else changes where locations are pooled by their mean."""


ENTRY = TaskEntry(
    name="internal",
    about="accuracy while the network is masked or made noisy inside, beside controls alike at all locations",
    source="Aubret et al. 2025",
    options=InternalOptions,
    home="coss_eval.tasks.internal.task:Internal",
    order=40,
    quick={"levels": (0.2, 0.5, 0.8), "seeds": 1},
    small={"levels": (0.5,), "seeds": 1},
)
