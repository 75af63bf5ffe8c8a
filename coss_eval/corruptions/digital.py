"""Contrast, elastic deformation, pixelation, JPEG and saturation.

The HSV round trip of saturate is done in closed form: changing S alone scales the channels' distances from V by S'/S.

Differences between the flavours (imagecorruptions against the original ImageNet-C code):
- pixelate: it enlarges with NEAREST, the original with BOX. Both take the nearest pixel; at a few sizes they differ
  where two are equally near;
- elastic_transform: no affine jitter, and a field of its own: amplitude and width are shares of the image's side. It
  has parameters for the "imagenet" table only; with the others, both flavours follow the original.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from coss_eval.corruptions.filters import smooth, take_rows, to_pixels
from coss_eval.corruptions.registry import MIN_SIDE, corruption
from coss_eval.corruptions.severity import SEVERITIES, Setting, SeverityParameters
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import cv2
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from coss_eval.corruptions.draws import Draws
else:
    cv2, np, torch, F = map(lazy, ("cv2", "numpy", "torch", "torch.nn.functional"))

_ELASTIC_ALPHA = (0.05, 0.065, 0.085, 0.1, 0.12)  # imagecorruptions' own


def _in_sides(side: int, *rows: SeverityParameters) -> tuple[SeverityParameters, ...]:
    """elastic_transform's parameters, published as multiples of the image's side."""
    return tuple(tuple(side * value for value in row) for row in rows)


@corruption(
    "contrast",
    category="digital",
    set="benchmark",
    severities={  # factor about the channel's mean
        "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
        "tiny-imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
        "cifar": (0.75, 0.5, 0.4, 0.3, 0.15),
    },
)
def contrast(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """(x - mean) c + mean, with the mean of each channel."""
    (factor,) = setting.parameters
    pixels = images.shape[-2] * images.shape[-1]
    mean = images.sum(dim=(-2, -1), keepdim=True, dtype=torch.int64).double() / pixels  # integers: any order, one sum
    return to_pixels((images * factor).add_((mean * (1 - factor)).float()))


@corruption(
    "elastic_transform",
    min_side=MIN_SIDE,
    category="digital",
    set="benchmark",
    severities={  # alpha, sigma, affine jitter
        "imagenet": _in_sides(
            244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)
        ),
        "tiny-imagenet": _in_sides(
            64, (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)
        ),
        "cifar": _in_sides(
            32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
        ),
    },
)
def elastic_transform(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Displaced by a smoothed random field; the original jitters three points of the image first (an affine map)."""
    height, width = images.shape[-2:]
    x = images.float()
    if setting.flavour == "imagecorruptions" and setting.table == "imagenet":
        alpha, amplitude = 250 * _ELASTIC_ALPHA[setting.severity - 1], 0.005 * height
        sigma = (0.01 * height, 0.01 * width)
    else:
        alpha, both, jitter = setting.parameters
        amplitude, sigma = 1.0, (both, both)
        x = _affine(x, draws.signed(3, 2).mul_(jitter))
    field = draws.signed(2, height, width).mul_(amplitude)  # (B, 2, H, W): right, down
    return to_pixels(_displace(x, smooth(field, sigma, truncate=3, border="symmetric").mul_(alpha)))


def _displace(x: Tensor, displacement: Tensor) -> Tensor:
    """x at (row + down, column + right), linearly interpolated, borders mirrored (scipy's mode "reflect")."""
    height, width = x.shape[-2:]
    columns = torch.arange(width, device=x.device) + displacement[:, 0]
    rows = torch.arange(height, device=x.device)[:, None] + displacement[:, 1]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _affine(x: Tensor, jitter: Tensor) -> Tensor:
    """The affine map that moves three points about the centre by ``jitter`` (B, 3, 2); borders reflect-101."""
    height, width = x.shape[-2:]
    centre = torch.tensor([height // 2, width // 2], dtype=torch.float64)
    reach = min(height, width) // 3
    points = centre + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    moved = points + jitter.cpu().double()  # (B, 3, 2), read as (column, row) like the published code
    ones = torch.ones_like(moved[..., :1])
    back = torch.linalg.solve(torch.cat([moved, ones], dim=-1), points.expand_as(moved)).float().to(x.device)
    columns, rows = torch.arange(width, device=x.device), torch.arange(height, device=x.device)[:, None]
    source = (columns[None, :, None] * back[:, None, None, 0] + rows[None, :, :, None] * back[:, None, None, 1]) + back[
        :, None, None, 2
    ]  # (B, H, W, 2)
    grid = 2 * source / torch.tensor([width - 1, height - 1], device=x.device) - 1
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)


@corruption(
    "pixelate",
    category="digital",
    set="benchmark",
    severities={  # scale
        "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
        "tiny-imagenet": (0.9, 0.8, 0.7, 0.6, 0.5),
        "cifar": (0.95, 0.9, 0.85, 0.75, 0.65),
    },
)
def pixelate(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Reduced by Pillow's BOX filter to the scale c, and enlarged again to blocks."""
    (scale,) = setting.parameters
    height, width = images.shape[-2:]
    rows, columns = int(height * scale), int(width * scale)
    nearest = setting.flavour == "imagecorruptions"
    # Columns are handled as rows of the transposed image: whole rows are gathered far faster.
    small = _box_rows(_box_rows(images.mT.contiguous(), columns).mT.contiguous(), rows)
    wide = take_rows(small.mT.contiguous(), _blocks(width, columns, nearest).to(images.device))
    return take_rows(wide.mT.contiguous(), _blocks(height, rows, nearest).to(images.device))


def _box_rows(images: Tensor, reduced: int) -> Tensor:
    """Rows reduced as Pillow does: the mean of the whole pixels whose centres lie in the box, rounded to uint8."""
    pixel, box, count = (table.to(images.device) for table in _boxes(images.shape[-2], reduced))
    size = (*images.shape[:-2], reduced, images.shape[-1])
    values = take_rows(images, pixel).to(torch.int16)  # a few of at most 255 a box: no overflow
    total = torch.zeros(size, dtype=torch.int16, device=images.device).index_add_(-2, box, values)
    # Halves are rounded up; the summand keeps them clear of the quotient's rounding error.
    return total.float().div_(count[:, None]).add_(0.5 + 1e-4).to(torch.uint8)


@lru_cache(maxsize=64)
def _boxes(length: int, reduced: int) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs (pixels (n,), boxes (n,)) of a pixel in a box, and each box's count (reduced,), by Pillow's Resample.c.

    Its arithmetic is followed to the letter: it decides, by rounding, whether a pixel on the edge of two boxes belongs
    to one of them, both or neither.
    """
    scale = length / reduced
    centre = ((torch.arange(reduced, dtype=torch.float64) + 0.5) * scale)[:, None]
    first = (centre - scale / 2 + 0.5).long().clamp_(min=0)
    pixel = first + torch.arange(math.ceil(scale) + 1)  # (reduced, at most), those near each box
    position = (pixel - centre + 0.5) * (1 / scale)
    inside = (position > -0.5) & (position <= 0.5) & (pixel < length)
    return pixel[inside], inside.nonzero()[:, 0], inside.sum(dim=1)


@lru_cache(maxsize=64)
def _blocks(length: int, reduced: int, nearest: bool) -> Tensor:
    """The source of each pixel (length,) when Pillow enlarges with NEAREST, which adds up steps, or with BOX."""
    step = reduced / length
    if nearest:
        positions = np.cumsum(np.concatenate([[step / 2], np.full(length - 1, step)]))
    else:
        positions = (np.arange(length) + 0.5) * step
    return torch.from_numpy(positions.astype(np.int64)).clamp_(max=reduced - 1)


@corruption(
    "jpeg_compression",
    category="digital",
    set="benchmark",
    severities={  # quality
        "imagenet": (25, 18, 15, 10, 7),
        "tiny-imagenet": (65, 58, 50, 40, 25),
        "cifar": (80, 65, 58, 50, 40),
    },
    image_by_image=True,
    on_cpu=SEVERITIES,
)
def jpeg_compression(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Encoded as JPEG with 4:2:0 chroma, as Pillow does, and decoded; on the CPU, whatever the device.

    By OpenCV: torchvision's codec is deprecated since 0.29, and Pillow's encoder holds Python's lock.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(setting.parameters[0])]
    pixels = images.cpu().numpy()
    decoded = np.empty(pixels.shape, np.uint8)
    for (red, green, blue), into in zip(pixels, decoded, strict=True):
        _, file = cv2.imencode(".jpg", cv2.merge((blue, green, red)), quality)
        cv2.split(cv2.imdecode(file, cv2.IMREAD_COLOR), list(into[::-1]))
    return torch.from_numpy(decoded).to(images.device)


@corruption(
    "saturate",
    category="digital",
    set="validation",
    severities={  # factor and summand for S of HSV
        "imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        "tiny-imagenet": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        "cifar": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
)
def saturate(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """a S + b in HSV. Grey has hue 0, so that with b > 0 it turns red, as in the published code."""
    factor, summand = setting.parameters
    value = images.amax(dim=1, keepdim=True).float()  # (B, 1, H, W), V
    chroma = value - images.amin(dim=1, keepdim=True)  # V S
    wanted = (factor * chroma + summand * value).minimum(value)  # V S'
    distance = (value - images) * (wanted / chroma.clamp(min=1))  # (B, 3, H, W), from V
    if summand:
        red = torch.zeros(3, 1, 1, device=images.device)
        red[1:] = 1
        distance = torch.where(chroma > 0, distance, wanted * red)
    return to_pixels(value - distance)
