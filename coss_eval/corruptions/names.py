"""The corruptions by name, torch-free: the ImageNet-C benchmark's, and those held out for validation.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019). What is in neither set (extra) is computed where it is named.
"""

from __future__ import annotations

from coss_eval.corruptions import blur, digital, noise, weather  # noqa: F401 (they register theirs)
from coss_eval.corruptions.registry import CORRUPTIONS, Category, Corruption, Function, Set, of_function
from coss_eval.corruptions.severity import SEVERITIES as SEVERITIES
from coss_eval.errors import unknown_name
from coss_eval.runtime.imports import imported

CATEGORIES: tuple[Category, ...] = ("noise", "blur", "weather", "digital")


def _of_set(wanted: Set) -> tuple[str, ...]:
    """The names of a set, category by category."""
    known = CORRUPTIONS.values()
    return tuple(c.name for category in CATEGORIES for c in known if (c.set, c.category) == (wanted, category))


BENCHMARK = _of_set("benchmark")
VALIDATION = _of_set("validation")
NAMES = (*BENCHMARK, *VALIDATION)
CATEGORY = {name: CORRUPTIONS[name].category for name in NAMES}

# Corruptions that the usual training augmentations (colour jitter, Gaussian blur) resemble: a network may have been
# trained to ignore them, so they are averaged apart from the rest. Defocus counts because it, too, is an isotropic
# low-pass filter of comparable width; noise, weather and compression appear in none of the toolkit's training views.
SEEN_LIKE = ("brightness", "contrast", "saturate", "gaussian_blur", "defocus_blur")
UNSEEN = tuple(name for name in NAMES if name not in SEEN_LIKE)


def find(wanted: str | Function | Corruption) -> Corruption:
    """A corruption by its name, by "package.module:function", or by its function itself.

    Raises UsageError with the nearest names where there is none.
    """
    if isinstance(wanted, Corruption):
        return wanted
    if not isinstance(wanted, str):
        return of_function(wanted)
    if wanted in CORRUPTIONS:
        return CORRUPTIONS[wanted]
    if ":" not in wanted:
        raise unknown_name("corruption", wanted, CORRUPTIONS)
    return of_function(imported(wanted, "corruption", "function"))
