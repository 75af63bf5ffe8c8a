"""How often the interval of a difference between methods holds the truth: new seeds and new images, simulated.

command: python benchmarks/intervals.py
hours: about a minute on one CPU core
expected: .93 to .97; measured .933 to .952 at 3, 6 and 10 seeds, but .87 to .89 where one run in ten of one method
collapses (most draws of few seeds have no such run, so nothing in them tells of it) and .97 to .98 where both do

A method's accuracy on an image is its mean, a seed's deviation, an image's difficulty (shared between methods but for
a part of its own) and noise of the seed on the image. Every draw has new seeds and new images; the truth is the
difference of the methods' means over both, a run that collapses included with its probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from coss_eval.statistics import contrast

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]  # deviations of that many seeds, with mean 0

SEEDS = (3, 6, 10)
DRAWS, IMAGES = 4000, 200
SD = 0.02  # of seeds: 2 points
COLLAPSE, DEPTH = 0.1, 0.3  # one run in ten loses 30 points


def normal(rng: np.random.Generator, seeds: int) -> Values:
    return rng.normal(0.0, SD, seeds)


def wide(rng: np.random.Generator, seeds: int) -> Values:
    return rng.normal(0.0, 4 * SD, seeds)


def narrow(rng: np.random.Generator, seeds: int) -> Values:
    return rng.normal(0.0, SD / 10, seeds)


def heavy(rng: np.random.Generator, seeds: int) -> Values:
    """Student's t with 3 degrees of freedom, scaled to the same deviation."""
    return SD * rng.standard_t(3, seeds) / np.sqrt(3)


def collapsing(rng: np.random.Generator, seeds: int) -> Values:
    lost = DEPTH * (rng.random(seeds) < COLLAPSE)
    return rng.normal(0.0, SD, seeds) - lost + COLLAPSE * DEPTH


CASES: dict[str, tuple[Draw, Draw]] = {
    "equal variances": (normal, normal),
    "variances 1 : 16": (normal, wide),
    "images dominate": (narrow, narrow),
    "heavy tails": (heavy, heavy),
    "one method collapses": (collapsing, normal),
    "both methods collapse": (collapsing, collapsing),
}


def method(rng: np.random.Generator, deviations: Values, difficulty: Values) -> Values:
    """Values (S, N) of one method's seeds on the images."""
    own = rng.normal(0.0, 0.15, len(difficulty))
    noise = rng.normal(0.0, 0.3, (len(deviations), len(difficulty)))
    return 0.6 + deviations[:, None] + difficulty + own + noise


def covered(case: tuple[Draw, Draw], seeds: int, rng: np.random.Generator) -> tuple[float, float]:
    """The share of intervals that hold the truth, and their median width."""
    hits, widths = 0, []
    for _ in range(DRAWS):
        difficulty = rng.normal(0.0, 0.3, IMAGES)
        a, b = (method(rng, draw(rng, seeds), difficulty) for draw in case)
        found = contrast([(1.0, a), (-1.0, b)])
        hits += found.low <= 0.0 <= found.high
        widths.append(found.high - found.low)
    return hits / DRAWS, float(np.median(widths))


def rows() -> Iterator[str]:
    """A line a case: coverage and median width at each number of seeds."""
    yield f"{'':<24}" + "".join(f"{seeds:>8} seeds" + " " * 8 for seeds in SEEDS)
    for number, (name, case) in enumerate(CASES.items()):
        found = [covered(case, seeds, np.random.default_rng([number, seeds])) for seeds in SEEDS]
        yield f"{name:<24}" + "".join(f"{hit:>8.3f} ({100 * width:5.1f} pt)  " for hit, width in found)


def main() -> None:
    print(
        f"coverage of 95 % intervals, {DRAWS} draws of {IMAGES} images (standard error .0034); median width in points"
    )
    for line in rows():
        print(line, flush=True)


if __name__ == "__main__":
    main()
