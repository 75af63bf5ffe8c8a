"""Views of image batches, made on the training device: ``draw`` decides what happens to each image, ``apply`` does it.

What is drawn belongs to (seed, epoch, view, sample id): batch size, sharding, order and resuming do not change it. It
is drawn on the CPU, so ``apply`` knows there which images an operation concerns and never waits for the device. Where
it is put on a GPU (``Parameters.on``), all images are worked on and those that are not concerned put back: more work,
with fewer launches, that a CUDA graph can hold. The operations are those of torchvision.transforms.v2 on float tensors
(bilinear with antialiasing), in BYOL's order: crop and flip in one resampling, colour jitter, greyscale, blur,
solarisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from coss_eval.errors import UsageError
from coss_eval.randomness import uniform
from coss_eval.views.augmentation import Augmentation, Views, byol_pair, multi_crop
from coss_eval.views.blur import gaussian_blur
from coss_eval.views.colour import greyscale_, jitter_, on_rows_, solarise_
from coss_eval.views.random_crop import crop, draw_boxes, draw_flips

__all__ = [
    "Augmentation",
    "ViewParameters",
    "Views",
    "apply",
    "byol_pair",
    "draw",
    "draw_views",
    "finish_views",
    "make_views",
    "multi_crop",
]

BatchImages = Tensor | Sequence[Tensor]

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}  # of one pass: what stays in the caches, what stays small in memory


@dataclass(frozen=True)
class ViewParameters:
    """What happens to each image of a batch; ``size`` and ``kernel`` (of the blur) are pixels.

    None stands for what happens to no image, whatever is drawn. ``static`` says that the work has the same shapes for
    every draw: as ``on`` makes it for a GPU.
    """

    size: int
    kernel: int
    boxes: Tensor | None  # int64 (B, 4): top, left, height, width; None where crop and flip are done already
    flip: Tensor  # bool (B,)
    jitter: Tensor | None  # bool (B,)
    order: Tensor | None  # int64 (B, 4): the jitter's operations as they follow, by torchvision's numbers
    factors: Tensor | None  # float32 (B, 4): brightness, contrast, saturation, hue
    greyscale: Tensor | None  # bool (B,)
    sigma: Tensor | None  # float32 (B,) pixels, 0 where there is no blur
    solarise: Tensor | None  # bool (B,)
    static: bool = False

    def __len__(self) -> int:
        return len(self.flip)

    def tensors(self) -> list[Tensor]:
        """All of them, for ``like``."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def like(self, tensors: Iterable[Tensor]) -> ViewParameters:
        """The same with other tensors, taken in the order of ``tensors()``."""
        given = iter(tensors)
        others: Any = {name: next(given) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **others)

    def rows(self, rows: slice) -> ViewParameters:
        """The parameters of some of the images."""
        return self.like(tensor[rows] for tensor in self.tensors())

    def on(self, device: torch.device) -> ViewParameters:
        """The parameters on a GPU, where the work on images takes the same shapes for every draw."""
        if self.static:
            return self
        return replace(self.like(t.to(device, non_blocking=True) for t in self.tensors()), static=True)


def draw(
    augmentation: Augmentation,
    ids: Tensor,
    sizes: tuple[int, int] | Tensor | None,
    *,
    seed: int,
    epoch: int,
    view: int,
) -> ViewParameters:
    """The parameters of view number ``view`` of the samples ``ids``, int64 (B,) on the CPU.

    ``sizes`` is the images' (height, width), one or int64 (B, 2); None where crop and flip were done elsewhere.
    """
    if ids.device.type != "cpu":
        raise UsageError(f"expected sample ids on the CPU, where views are drawn, got them on {ids.device}")
    a = augmentation
    chance = uniform(ids, seed, "views", epoch, view, "operations", shape=(5,))
    amount = uniform(ids, seed, "views", epoch, view, "amounts", shape=(9,))
    spread = torch.tensor((a.brightness, a.contrast, a.saturation, a.hue))
    low = (torch.tensor((1.0, 1.0, 1.0, 0.0)) - spread).clamp_(min=torch.tensor((0.0, 0.0, 0.0, -0.5)))
    high = torch.tensor((1.0, 1.0, 1.0, 0.0)) + spread
    sigma = amount[:, 8] * (a.blur_sigma[1] - a.blur_sigma[0]) + a.blur_sigma[0]
    return ViewParameters(
        size=a.size,
        kernel=a.kernel,
        boxes=None if sizes is None else draw_boxes(a, ids, sizes, seed=seed, epoch=epoch, view=view),
        flip=draw_flips(a, ids, seed=seed, epoch=epoch, view=view),
        jitter=chance[:, 1] < a.jitter if a.jitter else None,
        order=amount[:, :4].argsort(1) if a.jitter else None,
        factors=low + amount[:, 4:8] * (high - low) if a.jitter else None,
        greyscale=chance[:, 2] < a.greyscale if a.greyscale else None,
        sigma=torch.where(chance[:, 3] < a.blur, sigma, 0.0) if a.blur else None,
        solarise=chance[:, 4] < a.solarise if a.solarise else None,
    )


@torch.no_grad()
def apply(
    images: BatchImages,
    parameters: ViewParameters,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = True,
) -> Tensor:
    """The view float32 (B, 3, S, S) of uint8 images on their device, in [0, 1], or normalised by ``mean`` and ``std``.

    ``images`` are (B, 3, H, W), or a sequence of B images (3, H, W) of any sizes. Where ``parameters.boxes`` is None
    they are taken as cropped and flipped, (B, 3, S, S).
    """
    if len(images) != len(parameters):
        raise UsageError(f"expected as many images as parameters, got {len(images)} and {len(parameters)}")
    device, size = images[0].device, parameters.size
    layout = torch.channels_last if channels_last else torch.contiguous_format
    views = torch.empty(len(images), 3, size, size, device=device, memory_format=layout)
    scale, shift = _affine_of(*(None if each is None else tuple(each) for each in (mean, std)), device)
    step = max(1, _CHUNK_VALUES.get(device.type, 2**26) // (3 * size * size))
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        view = _unnormalised(images[rows], parameters.rows(rows))
        views[rows].copy_(view.mul_(scale).add_(shift))
    return views


def _unnormalised(images: BatchImages, p: ViewParameters) -> Tensor:
    if p.boxes is not None:
        x = crop(images, p.boxes, p.flip, p.size)
    elif isinstance(images, Tensor) and images.shape[1:] == (3, p.size, p.size):
        x = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    else:
        raise UsageError(f"expected images cropped to (3, {p.size}, {p.size}), got {tuple(images[0].shape)}")
    if p.jitter is not None and p.order is not None and p.factors is not None:
        jitter_(x, p.order, p.factors, p.jitter, static=p.static)
    if p.greyscale is not None:
        on_rows_(x, p.greyscale, lambda part, _: greyscale_(part), static=p.static)
    if (sigma := p.sigma) is not None:
        blurred = sigma > 0
        on_rows_(x, blurred, lambda part, rows: part.copy_(gaussian_blur(part, sigma[rows], p.kernel)), static=p.static)
    if p.solarise is not None:
        on_rows_(x, p.solarise, lambda part, _: solarise_(part), static=p.static)
    return x


@lru_cache(maxsize=16)
def _affine_of(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift (3, 1, 1) that normalise: x * scale + shift = (x - mean) / std. Kept: a graph copies nothing."""
    scale = 1 / torch.tensor((1.0, 1.0, 1.0) if std is None else std)
    shift = -torch.tensor((0.0, 0.0, 0.0) if mean is None else mean) * scale
    return scale.view(3, 1, 1).to(device, non_blocking=True), shift.view(3, 1, 1).to(device, non_blocking=True)


def draw_views(
    views: Views, ids: Tensor, sizes: tuple[int, int] | Tensor | None, *, seed: int, epoch: int
) -> list[ViewParameters]:
    """``draw`` for each view of a batch, the full ones first."""
    return [draw(each, ids, sizes, seed=seed, epoch=epoch, view=number) for number, each in enumerate(views)]


def make_views(
    images: BatchImages,
    ids: Tensor,
    views: Views,
    *,
    seed: int,
    epoch: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = True,
) -> list[Tensor]:
    """All views of a batch, the full ones first, each float32 (B, 3, S, S) on the images' device; see ``apply``.

    ``ids`` int64 (B,) lie on the CPU. Give images to the device first: uint8 is a quarter of the bytes of a view.
    """
    sizes = (
        (images.shape[2], images.shape[3])
        if isinstance(images, Tensor)
        else torch.tensor([image.shape[1:] for image in images])
    )
    drawn = draw_views(views, ids, sizes, seed=seed, epoch=epoch)
    return [apply(images, each, mean=mean, std=std, channels_last=channels_last) for each in drawn]


def finish_views(
    crops: Sequence[Tensor],
    ids: Tensor,
    views: Views,
    *,
    seed: int,
    epoch: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = True,
) -> list[Tensor]:
    """``make_views`` for images cropped and flipped by workers (``data.crop_files``): uint8 (B, 3, S, S) a view."""
    drawn = draw_views(views, ids, None, seed=seed, epoch=epoch)
    return [
        apply(cropped, each, mean=mean, std=std, channels_last=channels_last)
        for cropped, each in zip(crops, drawn, strict=True)
    ]
