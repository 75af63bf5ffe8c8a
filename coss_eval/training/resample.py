"""Crops, flips and blurs of whole batches, each image with its own box and width, as torchvision computes them.

A resized crop is two small matrix products per image, rows and columns, with the weights of the antialiasing triangle
filter; a flip reverses the columns' weights. Large images on the CPU go one by one instead, as the products grow with
the cube of the side (``crop_each``; on 4 cores it is the faster one from about 128 px).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_PRODUCTS_UP_TO = 128  # px, on the CPU
_GROUP_VALUES = 2**18  # of the images that are blurred together on the CPU


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
    narrow = images.to(torch.float32).view(count, channels * height, width).bmm(columns.mT)
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


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur of float images (B, 3, S, S), each by its ``sigma`` (B,) in pixels, on the CPU; the border is reflected.

    The Gaussian is sampled at ``kernel`` pixels, an odd number, and sums to 1.
    """
    offsets = torch.arange(kernel) - kernel // 2
    taps = offsets.div(sigma[:, None]).square_().mul_(-0.5).softmax(1)  # (B, kernel)
    if x.is_cuda:
        return blur_by_convolution(x, taps)
    blurred = torch.empty_like(x)
    by_width = sigma.argsort()  # images of like sigma together, as the widest kernel of a group counts
    for rows in torch.split(by_width, max(1, _GROUP_VALUES // x[0].numel())):
        blurred[rows] = blur_by_shifts(x[rows], taps[rows])
    return blurred


def blur_by_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Every map (B, 3, H, W) is a channel of one depthwise convolution along each axis; ``taps`` (B, kernel)."""
    maps, kernel = x.shape[0] * x.shape[1], taps.shape[1]
    reach = kernel // 2
    weight = taps.to(x.device, non_blocking=True).repeat_interleave(x.shape[1], 0)
    rows = F.pad(x, (0, 0, reach, reach), mode="reflect").flatten(0, 1)[None]
    blurred = F.conv2d(rows, weight.view(maps, 1, kernel, 1), groups=maps)
    columns = F.pad(blurred, (reach, reach, 0, 0), mode="reflect")
    return F.conv2d(columns, weight.view(maps, 1, 1, kernel), groups=maps).view_as(x)


def blur_by_shifts(x: Tensor, taps: Tensor) -> Tensor:
    """The same as a sum of shifted images; taps that add less than 1e-4 in all are left out. For the CPU."""
    reach = taps.shape[1] // 2
    weights = taps.max(0).values[: reach + 1]
    first = int((weights.cumsum(0) < 5e-5).sum())  # from the outermost tap inwards
    return _shifted_sum(_shifted_sum(x, taps, 2, reach - first), taps, 3, reach - first)


def _shifted_sum(x: Tensor, taps: Tensor, axis: int, reach: int) -> Tensor:
    length, centre = x.shape[axis], taps.shape[1] // 2
    weights = taps.T[:, :, None, None, None]  # (kernel, B, 1, 1, 1)
    padded = F.pad(x, (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0), mode="reflect")
    total = x * weights[centre]
    for shift in range(1, reach + 1):
        total.addcmul_(padded.narrow(axis, reach - shift, length), weights[centre - shift])
        total.addcmul_(padded.narrow(axis, reach + shift, length), weights[centre + shift])
    return total
