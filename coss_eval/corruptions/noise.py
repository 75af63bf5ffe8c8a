"""Noise of sensors and transmission: Gaussian, shot, impulse, speckle. No difference between the two flavours.

imagecorruptions draws impulse noise from a generator of scikit-image's own, which np.random.seed does not control;
here, as everywhere, the draws come from (seed, id, corruption, severity).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from coss_eval.corruptions.filters import to_pixels
from coss_eval.corruptions.registry import corruption
from coss_eval.corruptions.severity import Setting
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from scipy import stats
    from torch import Tensor

    from coss_eval.corruptions.draws import Draws
else:
    np, stats, torch = map(lazy, ("numpy", "scipy.stats", "torch"))


@corruption(
    "gaussian_noise",
    category="noise",
    set="benchmark",
    severities={  # standard deviation
        "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
        "tiny-imagenet": (0.04, 0.08, 0.12, 0.15, 0.18),
        "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
    },
)
def gaussian_noise(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """x + N(0, sigma)."""
    (sigma,) = setting.parameters
    return to_pixels(draws.normal(*images.shape[1:]).mul_(255 * sigma).add_(images))


@corruption(
    "shot_noise",
    category="noise",
    set="benchmark",
    severities={  # photons at full intensity
        "imagenet": (60, 25, 12, 5, 3),
        "tiny-imagenet": (250, 100, 50, 30, 15),
        "cifar": (500, 250, 100, 75, 50),
    },
)
def shot_noise(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Poisson(x c) / c, sampled from alias tables: pixels are uint8, so there are 256 distributions only."""
    (photons,) = setting.parameters
    threshold, detour, value = (table.to(images.device) for table in shot_tables(int(photons)))
    cells = threshold.shape[1]
    bits = draws.bits(*images.shape[1:])
    cell = images.to(torch.int32).mul_(cells).add_(bits & (cells - 1)).view(-1)  # (B 3 H W,)
    outcome = cell.bitwise_and(cells - 1)
    # The bits above those that chose the cell decide between its own outcome and its alias.
    beyond = (bits >> (cells.bit_length() - 1)).view(-1) >= threshold.view(-1).index_select(0, cell)
    outcome += detour.view(-1).index_select(0, cell).mul_(beyond)
    return value.index_select(0, outcome).view_as(images)


@lru_cache(maxsize=16)
def shot_tables(photons: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alias tables (256, K) of the photon count for each pixel value, and the pixel (K,) that a count becomes.

    The first holds each cell's threshold, the second the way from the cell's own count to its alias.

    Counts of ``photons`` and more are all clipped to white, so K is the power of two above ``photons``. The threshold
    is on the scale of a signed integer of 32 - log2(K) bits.
    """
    cells = 1 << photons.bit_length()
    counts = np.arange(photons)
    rates = np.arange(256)[:, None] / 255.0 * photons  # (256, 1)
    mass = np.zeros((256, cells))
    mass[:, :photons] = stats.poisson.pmf(counts, rates)
    mass[:, photons] = stats.poisson.sf(photons - 1, rates[:, 0])
    share, alias = _alias_tables(mass)
    scale = 2.0**32 / cells
    threshold = np.minimum(share * scale - scale / 2, scale / 2).astype(np.int64)
    value = np.clip(np.arange(cells) / float(photons), 0, 1) * 255
    return (
        torch.from_numpy(threshold.clip(max=2**31 - 1).astype(np.int32)),
        torch.from_numpy((alias - np.arange(cells)).astype(np.int32)),
        torch.from_numpy(value.astype(np.uint8)),
    )


def _alias_tables(mass: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Walker's alias method for each row (R, K) of probabilities: the share of each cell's own outcome, and its alias.

    "Robin Hood" (Marsaglia et al. 2004): the poorest cell is filled up by the richest, which becomes its alias.
    """
    rows, cells = mass.shape
    wealth = mass / mass.sum(axis=1, keepdims=True) * cells
    share, alias = np.ones_like(wealth), np.tile(np.arange(cells), (rows, 1))
    every = np.arange(rows)
    for _ in range(cells):
        poor, rich = wealth.argmin(axis=1), wealth.argmax(axis=1)
        open_ = wealth[every, poor] < 1
        row, poor, rich = every[open_], poor[open_], rich[open_]
        share[row, poor], alias[row, poor] = wealth[row, poor], rich
        wealth[row, rich] -= 1 - wealth[row, poor]
        wealth[row, poor] = 1
    return share, alias


@corruption(
    "impulse_noise",
    category="noise",
    set="benchmark",
    severities={  # share of elements
        "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
        "tiny-imagenet": (0.01, 0.02, 0.05, 0.08, 0.14),
        "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
    },
)
def impulse_noise(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Salt or pepper, equally likely, in a share of the elements."""
    (amount,) = setting.parameters
    field = draws.uniform(*images.shape[1:])
    kept, salt = (field >= amount).view(torch.uint8), (field < amount / 2).view(torch.uint8)
    return images.mul(kept).bitwise_or_(salt.mul_(255))  # masks as factors: several times faster than masked_fill


@corruption(
    "speckle_noise",
    category="noise",
    set="validation",
    severities={  # standard deviation at full intensity
        "imagenet": (0.15, 0.2, 0.35, 0.45, 0.6),
        "tiny-imagenet": (0.15, 0.2, 0.25, 0.3, 0.35),
        "cifar": (0.06, 0.1, 0.12, 0.16, 0.2),
    },
)
def speckle_noise(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """x + x N(0, sigma)."""
    (sigma,) = setting.parameters
    return to_pixels(draws.normal(*images.shape[1:]).mul_(sigma).add_(1).mul_(images))
