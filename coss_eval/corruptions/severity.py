"""What a severity means, torch-free: the parameters of every corruption at three image sizes, as published.

"imagenet" is ImageNet-C's table (224 px), "tiny-imagenet" Tiny-ImageNet-C's (64 px), "cifar" CIFAR-10-C's (32 px).
The meaning of each tuple stands beside its name in the first table; lengths are in pixels, intensities in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from coss_eval.corruptions.names import check_name, check_severity
from coss_eval.errors import unknown_name

Table = Literal["imagenet", "tiny-imagenet", "cifar"]
Flavour = Literal["imagecorruptions", "imagenet-c"]
Parameters = tuple[float, ...]


def _scalars(*values: float) -> tuple[Parameters, ...]:
    return tuple((value,) for value in values)


def _in_sides(side: int, *rows: Parameters) -> tuple[Parameters, ...]:
    """elastic_transform's parameters, published as multiples of the image's side."""
    return tuple(tuple(side * value for value in row) for row in rows)


_IMAGENET: dict[str, tuple[Parameters, ...]] = {
    "gaussian_noise": _scalars(0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": _scalars(60, 25, 12, 5, 3),  # photons at full intensity
    "impulse_noise": _scalars(0.03, 0.06, 0.09, 0.17, 0.27),  # share of elements
    "speckle_noise": _scalars(0.15, 0.2, 0.35, 0.45, 0.6),  # standard deviation at full intensity
    "gaussian_blur": _scalars(1, 2, 3, 4, 6),  # sigma
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, sigma of the smoothing
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # sigma, displacement, iterations
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, sigma
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # end, step of arange(1, ...)
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # amount, decay
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weight of image, of texture
    "snow": (  # mean, standard deviation, zoom, threshold, radius, sigma, weight of the image
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "brightness": _scalars(0.1, 0.2, 0.3, 0.4, 0.5),  # added to V of HSV
    "contrast": _scalars(0.4, 0.3, 0.2, 0.1, 0.05),  # factor about the channel's mean
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),  # factor and summand for S of HSV
    "jpeg_compression": _scalars(25, 18, 15, 10, 7),  # quality
    "pixelate": _scalars(0.6, 0.5, 0.4, 0.3, 0.25),  # scale
    "elastic_transform": _in_sides(  # alpha, sigma, affine jitter
        244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
    ),
    "spatter": (  # mean, standard deviation, sigma, threshold, strength (water) or sigma (mud), 1 where it is mud
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
}

_CIFAR: dict[str, tuple[Parameters, ...]] = {
    "gaussian_noise": _scalars(0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": _scalars(500, 250, 100, 75, 50),
    "impulse_noise": _scalars(0.01, 0.02, 0.03, 0.05, 0.07),
    "speckle_noise": _scalars(0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": _scalars(0.4, 0.6, 0.7, 0.8, 1),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "brightness": _scalars(0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": _scalars(0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "jpeg_compression": _scalars(80, 65, 58, 50, 40),
    "pixelate": _scalars(0.95, 0.9, 0.85, 0.75, 0.65),
    "elastic_transform": _in_sides(
        32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
    ),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
}

_TINY_IMAGENET: dict[str, tuple[Parameters, ...]] = {
    "gaussian_noise": _scalars(0.04, 0.08, 0.12, 0.15, 0.18),
    "shot_noise": _scalars(250, 100, 50, 30, 15),
    "impulse_noise": _scalars(0.01, 0.02, 0.05, 0.08, 0.14),
    "speckle_noise": _scalars(0.15, 0.2, 0.25, 0.3, 0.35),
    "gaussian_blur": _scalars(0.5, 0.75, 1, 1.25, 1.5),
    "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    "zoom_blur": _CIFAR["zoom_blur"],
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "frost": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    "brightness": _IMAGENET["brightness"],
    "contrast": _IMAGENET["contrast"],
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    "jpeg_compression": _scalars(65, 58, 50, 40, 25),
    "pixelate": _scalars(0.9, 0.8, 0.7, 0.6, 0.5),
    "elastic_transform": _in_sides(
        64, (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)
    ),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.6, 0),
        (0.65, 0.1, 0.8, 0.7, 0.6, 0),
        (0.65, 0.3, 1, 0.69, 0.6, 0),
        (0.65, 0.1, 0.7, 0.68, 0.6, 1),
        (0.65, 0.1, 0.5, 0.67, 0.6, 1),
    ),
}

_TABLES: dict[Table, dict[str, tuple[Parameters, ...]]] = {
    "imagenet": _IMAGENET,
    "tiny-imagenet": _TINY_IMAGENET,
    "cifar": _CIFAR,
}
TABLES: tuple[Table, ...] = get_args(Table)


def table_for(size: tuple[int, int]) -> Table:
    """The table for images of ``size`` (height, width): the nearest of 32, 64 and 224 to the shorter side, in ratio."""
    side = min(size)
    if side <= 45:  # the geometric mean of 32 and 64
        return "cifar"
    if side <= 119:  # that of 64 and 224
        return "tiny-imagenet"
    return "imagenet"


def check_table(table: str) -> Table:
    """``table`` itself if it is one of TABLES; UsageError with the nearest names otherwise."""
    for known in TABLES:
        if table == known:
            return known
    raise unknown_name("severity table", table, TABLES)


def parameters(name: str, severity: int, table: Table) -> Parameters:
    """The parameters of corruption ``name`` at ``severity`` (1 to 5) in ``table``."""
    return _TABLES[check_table(table)][check_name(name)][check_severity(severity) - 1]


@dataclass(frozen=True)
class Condition:
    """One corruption at one severity, with all that its pixels depend on beside the image and its draws.

    ``flavour`` "imagecorruptions" follows that package, "imagenet-c" the benchmark's original code where they differ.
    """

    name: str
    severity: int
    table: Table = "imagenet"
    flavour: Flavour = "imagecorruptions"

    @property
    def parameters(self) -> Parameters:
        return parameters(self.name, self.severity, self.table)
