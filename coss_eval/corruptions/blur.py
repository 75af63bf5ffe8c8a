"""Blur of lenses, glass, motion and zoom.

Differences between the flavours (imagecorruptions against the original ImageNet-C code):
- zoom_blur: the zoomed images are cropped from the top-left corner, not from the centre: the centre of mass moves;
- motion_blur: the kernel ends where it would leave a small image, and the image loses that light.

Through rounding, scipy leaves the last row or column of a zoomed image black at a few sizes (150 px by 3); here it
never is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from coss_eval.corruptions.filters import pad, resample, shifted_sum, smooth, to_pixels
from coss_eval.corruptions.registry import MIN_SIDE, corruption
from coss_eval.corruptions.severity import Setting
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from scipy import fft
    from torch import Tensor

    from coss_eval.corruptions.draws import Draws
else:
    np, fft, torch = map(lazy, ("numpy", "scipy.fft", "torch"))

# A kernel of more taps than this is faster by FFT.
_MOST_TAPS = 49


@corruption(
    "defocus_blur",
    min_side=MIN_SIDE,
    category="blur",
    set="benchmark",
    severities={  # radius, sigma of the smoothing
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "tiny-imagenet": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
    image_by_image=True,
)
def defocus_blur(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Filtered with a disk whose rim is smoothed."""
    kernel = disk(*setting.parameters)
    height, width = images.shape[-2:]
    reach = kernel.shape[0] // 2
    padded = pad(images.float(), reach, reach, "reflect101")
    if int(kernel.count_nonzero()) <= _MOST_TAPS:
        taps = [(row, column, float(kernel[row, column])) for row, column in kernel.nonzero().tolist()]
        return to_pixels(shifted_sum(padded, taps, height, width))
    size = (fft.next_fast_len(padded.shape[-2], real=True), fft.next_fast_len(padded.shape[-1], real=True))
    spectrum = _spectrum(kernel, size).to(images.device)
    # One image at a time: a plan for another batch size might round differently.
    blurred = [_filtered(x, spectrum, size) for x in padded]
    inner = [x[..., 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width] for x in blurred]
    return to_pixels(torch.stack(inner))


@lru_cache(maxsize=16)
def disk(radius: float, smoothing: float) -> Tensor:
    """The defocus kernel, float32: a disk on a 17 x 17 grid (wider above radius 8), smoothed as by OpenCV."""
    reach = 8 if radius <= 8 else int(radius)
    offsets = torch.arange(-reach, reach + 1)
    aliased = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    half = 1 if radius <= 8 else 2
    weights = [math.exp(-0.5 * (i / smoothing) ** 2) for i in range(-half, half + 1)]
    taps = [weight / sum(weights) for weight in weights]
    padded = pad(aliased / aliased.sum(), half, half, "reflect101")
    down = shifted_sum(padded, [(i, 0, tap) for i, tap in enumerate(taps)], 2 * reach + 1, padded.shape[1])
    smoothed = shifted_sum(down, [(0, i, tap) for i, tap in enumerate(taps)], 2 * reach + 1, 2 * reach + 1)
    return torch.where(smoothed > 1e-7, smoothed, 0).float()


@lru_cache(maxsize=32)
def _spectrum(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The transform of a symmetric kernel that stands in the corner of an image of ``size``."""
    spectrum: Tensor = torch.fft.rfft2(kernel, s=size)
    return spectrum


def _filtered(x: Tensor, spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) times a spectrum. On the CPU by SciPy: torch's rounds otherwise with other threads, at a few sizes."""
    if x.device.type == "cpu":
        transformed = fft.rfft2(x.numpy(), s=size) * spectrum.numpy()
        return torch.from_numpy(fft.irfft2(transformed, s=size, overwrite_x=True))
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x, s=size).mul_(spectrum), s=size)
    return filtered


@corruption(
    "glass_blur",
    min_side=MIN_SIDE,
    category="blur",
    set="benchmark",
    severities={  # sigma, displacement, iterations
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "tiny-imagenet": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    },
)
def glass_blur(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Blurred, each pixel replaced by one nearby, blurred again."""
    sigma, reach, iterations = setting.parameters[0], int(setting.parameters[1]), int(setting.parameters[2])
    height, width = images.shape[-2:]
    pixels = to_pixels(smooth(images.float(), sigma))
    source: Tensor | None = None
    for _ in range(iterations):
        displacement = draws.integers(2 * reach, 2, height, width) - reach  # (B, 2, H, W): right, down
        step = scatter_map(displacement, reach)
        source = step if source is None else source.gather(1, step)
    assert source is not None, "every severity has an iteration"
    shuffled = pixels.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view_as(pixels)
    return to_pixels(smooth(shuffled.float(), sigma))


def scatter_map(displacement: Tensor, reach: int) -> Tensor:
    """Where each pixel's value comes from after one pass of glass_blur's loop: flat indices, int64 (B, H W).

    The published loop goes through the image backwards and "swaps" each pixel with the displaced one; since NumPy
    slices alias, the swap is a copy: x[p] = x[q]. Where q > p in raster order, q was visited before and holds its final
    value; else it still holds the original. So each pixel points to a final or an original value, and doubling the
    pointers follows all chains to their originals at once, in a logarithmic number of steps.

    Args:
        displacement: int (B, 2, H, W), to the right and down, in [-reach, reach).
        reach: pixels nearer to the border than this are never visited (nor is the last row and column of the margin).
    """
    height, width = displacement.shape[-2:]
    count = height * width
    offset = torch.zeros_like(displacement[:, 0])
    visited = (..., slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    offset[visited] = (displacement[:, 1] * width + displacement[:, 0])[visited]
    offset = offset.flatten(1)  # (B, H W), 0 where a pixel keeps its value
    # Pointers below ``count`` mean final values, those from ``count`` on mean originals.
    pointer = torch.arange(count, device=offset.device) + offset + (offset <= 0) * count
    originals = torch.arange(count, 2 * count, device=offset.device).expand_as(pointer)
    while int(pointer.amin()) < count:
        pointer = torch.cat([pointer, originals], dim=1).gather(1, pointer)
    return pointer - count


@corruption(
    "motion_blur",
    min_side=MIN_SIDE,
    category="blur",
    set="benchmark",
    severities={  # radius, sigma
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "tiny-imagenet": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    },
)
def motion_blur(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Smeared one-sidedly along an angle from -45 to 45 degrees of the horizontal."""
    radius, sigma = setting.parameters
    angle = draws.uniform(1)[:, 0].double() * 90 - 45
    return to_pixels(smeared(images.float(), angle, int(radius), sigma, cut=setting.flavour == "imagecorruptions"))


def smeared(x: Tensor, angle: Tensor, radius: int, sigma: float, cut: bool) -> Tensor:
    """ImageMagick's motion blur of (B, C, H, W) along ``angle`` (B,) in degrees, with edge clamp.

    Weights are exp(-i^2 / 2 sigma^2) for i = 0..2 radius; ``cut`` drops, without renormalising, those from the first on
    whose shift is as long as the image (imagecorruptions).
    """
    height, width = x.shape[-2:]
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    radians = torch.deg2rad(angle.cpu())[:, None]  # (B, 1)
    down = torch.ceil(steps * torch.sin(radians) - 0.5).long()  # (B, T), where the tap's pixel lies
    right = torch.ceil(steps * torch.cos(radians) - 0.5).long()
    reach = 2 * radius
    padded = pad(x, reach, reach, "nearest")
    inside = (down.abs() < height) & (right.abs() < width)
    counts = [valid.index(False) if cut and False in valid else len(valid) for valid in inside.tolist()]
    total = torch.zeros_like(x)
    places = list(zip(total, padded, down.tolist(), right.tolist(), counts, strict=True))
    for tap, weight in enumerate(weights[: max(counts)].tolist()):
        # each image's window lies elsewhere; one call of torch for them all
        here = [(into, image, rows[tap], columns[tap]) for into, image, rows, columns, count in places if tap < count]
        windows = [
            image[:, reach + row : reach + row + height, reach + column : reach + column + width]
            for _, image, row, column in here
        ]
        torch._foreach_add_([into for into, *_ in here], windows, alpha=weight)
    return total


@corruption(
    "zoom_blur",
    min_side=MIN_SIDE,
    category="blur",
    set="benchmark",
    severities={  # end, step of arange(1, ...)
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "tiny-imagenet": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    },
    image_by_image=True,
)
def zoom_blur(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """The mean of the image and its zooms by 1, 1 + step, ... up to ``end``."""
    end, step = setting.parameters
    factors = np.arange(1, end, step).tolist()  # np.arange, for its number of terms in floating point
    centred = setting.flavour == "imagenet-c"
    x = images.float()
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor, (images.shape[-2], images.shape[-1]), centred)
    return to_pixels(total.div_(len(factors) + 1))


def zoomed(x: Tensor, factor: float, size: tuple[int, int] | None, centred: bool) -> Tensor:
    """scipy.ndimage.zoom (order 1) of the middle of (..., H, W) by ``factor``, which is at least H x W large.

    It is cropped to ``size`` about its centre, or from its top-left corner; None leaves it whole.
    """
    rows = _zoom_source(x.shape[-2], factor, size and size[0], centred)
    columns = _zoom_source(x.shape[-1], factor, size and size[1], centred)
    return resample(x, (rows[0].to(x.device), rows[1].to(x.device)), (columns[0].to(x.device), columns[1].to(x.device)))


@lru_cache(maxsize=128)
def _zoom_source(length: int, factor: float, kept: int | None, centred: bool) -> tuple[Tensor, Tensor]:
    """Where each of the ``kept`` positions of a zoomed axis comes from: source index, and weight of the next one."""
    part = math.ceil(length / factor)
    size = round(part * factor)
    source = (length - part) // 2 + torch.arange(size, dtype=torch.float64) * ((part - 1) / (size - 1))
    if kept is not None:
        trim = (size - kept) // 2 if centred else 0
        source = source[trim : trim + kept]
    index = source.floor()
    return index.long(), (source - index).float()


@corruption(
    "gaussian_blur",
    category="blur",
    set="validation",
    severities={  # sigma
        "imagenet": (1, 2, 3, 4, 6),
        "tiny-imagenet": (0.5, 0.75, 1, 1.25, 1.5),
        "cifar": (0.4, 0.6, 0.7, 0.8, 1),
    },
    image_by_image=True,
)
def gaussian_blur(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Averaged with its neighbours under a Gaussian of width sigma."""
    (sigma,) = setting.parameters
    return to_pixels(smooth(images.float(), sigma))
