"""Gaussian blurs of whole batches, each image with its own width, as torchvision computes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP_VALUES = 2**18  # of the images that are blurred together on the CPU


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur of float images (B, 3, S, S), each by its ``sigma`` (B,) in pixels; the border is reflected.

    The Gaussian is sampled at ``kernel`` pixels, an odd number, and sums to 1. ``sigma`` lies on the CPU, or on the
    images' GPU.
    """
    offsets = torch.arange(kernel, device=sigma.device) - kernel // 2
    taps = offsets.div(sigma[:, None].clamp_min(1e-3)).square_().mul_(-0.5).softmax(1)  # (B, kernel)
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
