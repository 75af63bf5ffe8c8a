"""The corruptions by name, torch-free: the 15 of the ImageNet-C benchmark and the 4 held out for validation.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019).
"""

from __future__ import annotations

from typing import Literal

from coss_eval.errors import UsageError, unknown_name

Category = Literal["noise", "blur", "weather", "digital"]

SEVERITIES = (1, 2, 3, 4, 5)

_BENCHMARK: dict[str, Category] = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "defocus_blur": "blur",
    "glass_blur": "blur",
    "motion_blur": "blur",
    "zoom_blur": "blur",
    "snow": "weather",
    "frost": "weather",
    "fog": "weather",
    "brightness": "weather",
    "contrast": "digital",
    "elastic_transform": "digital",
    "pixelate": "digital",
    "jpeg_compression": "digital",
}
_VALIDATION: dict[str, Category] = {
    "speckle_noise": "noise",
    "gaussian_blur": "blur",
    "spatter": "weather",
    "saturate": "digital",
}

CATEGORY: dict[str, Category] = {**_BENCHMARK, **_VALIDATION}
CATEGORIES: tuple[Category, ...] = ("noise", "blur", "weather", "digital")
BENCHMARK = tuple(_BENCHMARK)
VALIDATION = tuple(_VALIDATION)
NAMES = (*BENCHMARK, *VALIDATION)

# Corruptions that the usual training augmentations (colour jitter, Gaussian blur) resemble: a network may have been
# trained to ignore them, so they are averaged apart from the rest. Defocus counts because it, too, is an isotropic
# low-pass filter of comparable width; noise, weather and compression appear in none of the toolkit's training views.
SEEN_LIKE = ("brightness", "contrast", "saturate", "gaussian_blur", "defocus_blur")
UNSEEN = tuple(name for name in NAMES if name not in SEEN_LIKE)


def check_name(name: str) -> str:
    """``name`` itself if it is one of NAMES; UsageError with the nearest names otherwise."""
    if name not in CATEGORY:
        raise unknown_name("corruption", name, NAMES)
    return name


def check_severity(severity: int) -> int:
    """``severity`` itself if it is an integer from 1 to 5; UsageError otherwise."""
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise UsageError(f"severity must be an integer from 1 to 5, got {severity!r}")
    return int(severity)
