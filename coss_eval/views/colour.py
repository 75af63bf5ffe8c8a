"""Colour operations on float images (B, 3, H, W) in [0, 1], each image with its own parameters, as in torchvision.

Functions that end in an underscore change the images in place and return nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of the four operations
_LUMA = (0.2989, 0.587, 0.114)


SomeRows = Tensor | slice


def on_rows_(x: Tensor, chosen: Tensor, change_: Callable[[Tensor, SomeRows], object], *, static: bool = False) -> None:
    """``change_(images, rows)`` in place on the images that ``chosen`` bool (B,) names.

    They alone are worked on, which needs ``chosen`` on the CPU. With ``static`` all are, and those not chosen put
    back: more work, of the same shapes for every draw, and ``chosen`` lies on the images' device.
    """
    if static:
        changed = x.clone()
        change_(changed, slice(None))
        torch.where(chosen[:, None, None, None], changed, x, out=x)
        return
    rows = chosen.nonzero().flatten()
    if len(rows) == len(x):
        change_(x, rows)
    elif len(rows):
        index = rows.to(x.device, non_blocking=True)
        part = x.index_select(0, index)
        change_(part, rows)
        x.index_copy_(0, index, part)


def grey(x: Tensor) -> Tensor:
    """Luma as torchvision weighs it, (B, 1, H, W)."""
    red, green, blue = (x[:, channel : channel + 1] for channel in range(3))
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def jitter_(x: Tensor, order: Tensor, factors: Tensor, drawn: Tensor, *, static: bool = False) -> None:
    """ColorJitter on the images ``drawn``: the four operations in each image's own order.

    ``order`` int64 (B, 4) lists the operations as they are applied, ``factors`` float32 (B, 4) holds the factors of
    brightness, contrast, saturation and the hue's shift in turns, ``drawn`` bool (B,). All three are on the CPU, or
    with ``static`` on the device (see ``on_rows_``), so that no step waits for it. Brightness, contrast and saturation
    are the same map, x to keep x + to_grey grey(x) + to_mean mean(grey(x)), so three such steps, each with a clamp, do
    all orders at once; the hue goes in between.
    """
    if not static and not drawn.any():
        return
    affine = order.gather(1, (order == HUE).byte().argsort(dim=1, stable=True)[:, :3])  # (B, 3): the others, in order
    factor = torch.where(drawn[:, None], factors.gather(1, affine), 1.0)
    to_grey = torch.where(affine == SATURATION, 1 - factor, 0.0)
    to_mean = torch.where(affine == CONTRAST, 1 - factor, 0.0)
    steps = torch.stack((factor, to_grey, to_mean)).to(x.device, non_blocking=True)  # (3, B, 3)
    hue_place = torch.where(drawn & (factors[:, HUE] != 0), (order == HUE).long().argmax(1), -1)  # -1: never
    for place in range(4):
        if place:
            _blend_(x, *steps[:, :, place - 1, None, None, None])
        on_rows_(x, hue_place == place, lambda part, rows: rotate_hue_(part, factors[rows, HUE]), static=static)


def _blend_(x: Tensor, keep: Tensor, to_grey: Tensor, to_mean: Tensor) -> None:
    """Coefficients (B, 1, 1, 1)."""
    shade = grey(x)
    mean = shade.mean((1, 2, 3), keepdim=True)
    x.mul_(keep).add_(shade.mul_(to_grey).add_(mean.mul_(to_mean))).clamp_(0, 1)


def rotate_hue_(x: Tensor, turns: Tensor) -> None:
    """The hue moved by ``turns`` (B,) of a full turn, saturation and value of HSV kept.

    The hue itself comes without cases: on the scale where a colour's lowest channel is 0 and its highest 1, it lies
    (1 + green + blue - red) / 6 of a turn from red, towards green where green exceeds blue. A channel of hue h is then
    low + chroma clamp(6 d - 1, 0, 1), d in [0, 1/2] being how far h is, around the circle, from the channel's opposite.
    """
    red, green, blue = x.unbind(1)  # (B, H, W) each
    low = torch.minimum(red, green).minimum(blue)
    six_chroma = torch.maximum(red, green).maximum(blue).sub_(low).mul_(6)
    hue = (green + blue).sub_(red).sub_(low).div_(six_chroma.clamp_min(1e-12)).add_(1 / 6)
    hue.copysign_(green - blue).add_(turns.to(x.device, non_blocking=True)[:, None, None])
    low.sub_(six_chroma, alpha=1 / 6)
    # frac() - 1/2 is 0 where the hue is the channel's opposite: at 1/2, 5/6 and 1/6; whole turns keep frac() positive
    for channel, offset in zip((red, green, blue), (2, 2 - 1 / 3, 2 + 1 / 3), strict=True):
        distance = (hue + offset).frac_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(low, six_chroma, distance, out=channel)


def greyscale_(x: Tensor) -> None:
    """All three channels become the luma."""
    x.copy_(grey(x).expand_as(x))


def solarise_(x: Tensor) -> None:
    """Values of 1/2 and more are inverted: min(x, 1 - x)."""
    torch.minimum(x, 1 - x, out=x)
