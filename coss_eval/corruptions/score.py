"""mCE and relative mCE: a benchmark's errors relative to AlexNet's.

Every function takes ``errors``, a mapping from (corruption, severity) to the error there: a fraction, or an array (N,)
of each image's own error (0 or 1) in one fixed order. All scores are linear in the errors, so arrays give each image's
share of the score, (N,), whose mean is the score and whose spread gives its interval. A missing condition is a gap:
the score is refused and the conditions that lack are named; nothing is averaged over what happens to be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy.typing as npt

from coss_eval.corruptions.names import BENCHMARK, SEVERITIES
from coss_eval.errors import UsageError

Value = TypeVar("Value", float, npt.NDArray[Any])
Errors = Mapping[tuple[str, int], Value]

# AlexNet's mean error over the severities of ImageNet-C (Hendrycks & Dietterich 2019); torchvision's on clean images.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
    "speckle_noise": 0.845388,
    "gaussian_blur": 0.787108,
    "spatter": 0.717512,
    "saturate": 0.658248,
}
ALEXNET_CLEAN = 0.4348


def by_corruption(errors: Errors[Value]) -> dict[str, Value]:
    """Each corruption's mean error over the five severities. Raises UsageError where one is missing."""
    gaps = [(name, severity) for name in BENCHMARK for severity in SEVERITIES if (name, severity) not in errors]
    if gaps:
        shown = ", ".join(f"{name} {severity}" for name, severity in gaps[:3])
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        raise UsageError(
            f"no score over {len(BENCHMARK)} corruptions: missing {shown}{more}; run these conditions first"
        )
    return {name: _mean([errors[name, severity] for severity in SEVERITIES]) for name in BENCHMARK}


def mce(errors: Errors[Value], *, dataset: str, side: int, table: str) -> Value:
    """mCE: the mean over the benchmark of (error summed over severities) / (AlexNet's), as a fraction; AlexNet has 1.

    Defined for ImageNet's 1,000 classes at 224 px with ImageNet-C's severities only: others raise UsageError.
    """
    _check_normaliser(dataset, side, table)
    return _mean([error / ALEXNET[name] for name, error in by_corruption(errors).items()])


def relative_mce(errors: Errors[Value], clean_error: Value, *, dataset: str, side: int, table: str) -> Value:
    """Relative mCE: as mCE, with the clean error taken from the network's errors and AlexNet's from AlexNet's."""
    _check_normaliser(dataset, side, table)
    means = by_corruption(errors)
    return _mean([(error - clean_error) / (ALEXNET[name] - ALEXNET_CLEAN) for name, error in means.items()])


def _mean(values: list[Value]) -> Value:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values)


def _check_normaliser(dataset: str, side: int, table: str) -> None:
    if (dataset, side, table) != ("imagenet", 224, "imagenet"):
        raise UsageError(
            'mCE is normalised by AlexNet on "imagenet" at 224 px with the "imagenet" table, got '
            f'"{dataset}" at {side} px with "{table}"; report the mean corruption error instead'
        )
