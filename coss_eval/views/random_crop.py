"""Random resized crops and flips of training images: what is drawn for each sample, and whole batches cropped by it.

A resized crop is two small matrix products per image, rows and columns, with the weights of the antialiasing triangle
filter; a flip reverses the columns' weights. Large images on the CPU go one by one instead, as the products grow with
the cube of the side (``crop_each``; on 4 cores it is the faster one from about 128 px).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_eval.errors import UsageError
from coss_eval.randomness import uniform

_TRIES = 10  # for a box that fits, as torchvision
_PRODUCTS_UP_TO = 128  # px, on the CPU


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A box of the image resized to ``size`` x ``size`` pixels, flipped left to right with probability ``flip``.

    ``crop_min_scale`` (the paper's c_min) and ``crop_max_scale`` bound the box's share of the image's area, ``ratio``
    its width / height: torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """

    size: int
    crop_min_scale: float = 0.08
    crop_max_scale: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            refuse("size to be at least 1 pixel", self.size)
        if not 0 < self.crop_min_scale <= self.crop_max_scale <= 1:
            refuse("0 < crop_min_scale <= crop_max_scale <= 1", (self.crop_min_scale, self.crop_max_scale))
        if not 0 < self.ratio[0] <= self.ratio[1]:
            refuse("ratio to be two rising numbers above 0", self.ratio)
        if not 0 <= self.flip <= 1:
            refuse("flip to be a probability from 0 to 1", self.flip)


def refuse(expected: str, came: object) -> None:
    raise UsageError(f"an augmentation needs {expected}, got {came}")


def draw_flips(a: RandomCrop, ids: Tensor, *, seed: int, epoch: int, view: int = 0, purpose: str = "views") -> Tensor:
    """Which of the samples ``ids`` int64 (B,) are flipped, bool (B,); ``purpose`` as in ``draw_boxes``."""
    return uniform(ids, seed, purpose, epoch, view, "operations", shape=(1,))[:, 0] < a.flip


def draw_boxes(
    a: RandomCrop,
    ids: Tensor,
    sizes: tuple[int, int] | Tensor,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    purpose: str = "views",
) -> Tensor:
    """Crop boxes int64 (B, 4) as (top, left, height, width), distributed as torchvision's RandomResizedCrop draws them.

    ``sizes`` is the images' (height, width), one or int64 (B, 2). Area uniform, log of width / height uniform; the
    first of ten tries that fits into the image, else the largest central box of an allowed ratio. Draws for another
    ``purpose`` than pretraining's "views" are independent of those, at equal seeds too.
    """
    height, width = torch.as_tensor(sizes).expand(len(ids), 2).to(torch.float64).T  # (B,) each
    unit = uniform(ids, seed, purpose, epoch, view, "boxes", shape=(2 * _TRIES + 2,)).to(torch.float64)
    share = a.crop_min_scale + unit[:, :_TRIES] * (a.crop_max_scale - a.crop_min_scale)  # (B, tries)
    area = share * (height * width)[:, None]
    low, high = math.log(a.ratio[0]), math.log(a.ratio[1])
    ratio = (low + unit[:, _TRIES : 2 * _TRIES] * (high - low)).exp_()
    widths, heights = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = fits.byte().argmax(1, keepdim=True)
    found = fits.any(1)
    in_ratio = width / height
    box_height = torch.where(
        found,
        heights.gather(1, first)[:, 0],
        torch.where(in_ratio < a.ratio[0], (width / a.ratio[0]).round(), height),
    )
    box_width = torch.where(
        found,
        widths.gather(1, first)[:, 0],
        torch.where(in_ratio > a.ratio[1], (height * a.ratio[1]).round(), width),
    )
    free = torch.stack((height - box_height, width - box_width), 1)  # (B, 2)
    corner = torch.where(found[:, None], (unit[:, -2:] * (free + 1)).floor(), (free / 2).floor())
    return torch.cat((corner, box_height[:, None], box_width[:, None]), 1).to(torch.int64)


def crop(images: Tensor | Sequence[Tensor], boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Each image's box resized to (size, size), flipped left to right where ``flip``: float32 (B, 3, S, S) in [0, 1].

    ``images`` uint8 (B, 3, H, W), or B of them (3, H, W) of any sizes; ``boxes`` int64 (B, 4) as (top, left, height,
    width) and ``flip`` bool (B,), both on the CPU. Bilinear with antialiasing.
    """
    if isinstance(images, Tensor) and (images.is_cuda or size * max(images.shape[2:]) <= _PRODUCTS_UP_TO**2):
        return crop_batch(images, boxes, flip, size)
    return crop_each(images, boxes, flip, size)


def crop_batch(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """``crop`` by matrix products, for images of one size."""
    count, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.T.to(images.device, torch.float32, non_blocking=True)
    flip = flip.to(images.device, non_blocking=True)
    rows = _triangle_weights(top, box_height, torch.zeros_like(flip), height, size)  # (B, S, H)
    columns = _triangle_weights(left, box_width, flip, width, size).div_(255)  # (B, S, W)
    rows_of_all = images.to(torch.float32, memory_format=torch.contiguous_format).view(count, channels * height, width)
    narrow = rows_of_all.bmm(columns.mT)
    return rows[:, None].matmul(narrow.view(count, channels, height, size))


def crop_each(images: Tensor | Sequence[Tensor], boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """``crop`` by one ``interpolate`` an image."""
    views = torch.empty(len(images), 3, size, size, device=images[0].device)
    for view, image, (top, left, height, width), flipped in zip(
        views, images, boxes.tolist(), flip.tolist(), strict=True
    ):
        patch = image[None, :, top : top + height, left : left + width]
        patch = (patch.flip(-1) if flipped else patch).to(torch.float32)
        view.copy_(F.interpolate(patch, (size, size), mode="bilinear", antialias=True)[0])
    return views.div_(255)


def _triangle_weights(start: Tensor, length: Tensor, reverse: Tensor, size_in: int, size_out: int) -> Tensor:
    """How much each input position counts for each output one, float32 (B, size_out, size_in); rows sum to 1.

    The triangle is as wide as an output pixel, at least as an input pixel, and is cut where the box from ``start`` over
    ``length`` ends (each (B,)). ``reverse`` (B,) runs from the box's end to its start.
    """
    start, length, reverse = start[:, None], length[:, None], reverse[:, None]
    scale = length / size_out  # (B, 1)
    radius = scale.clamp_min(1)
    centres = (torch.arange(size_out, device=start.device) + 0.5) * scale  # (B, size_out)
    centres = torch.where(reverse, length - centres, centres) / radius
    positions = torch.arange(size_in, device=start.device) + 0.5 - start  # (B, size_in)
    positions = torch.where((positions > 0) & (positions < length), positions / radius, torch.inf)
    weights = (centres[:, :, None] - positions[:, None, :]).abs_().neg_().add_(1).clamp_min_(0)
    return weights.div_(weights.sum(2, keepdim=True))
