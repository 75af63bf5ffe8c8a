"""Views of image batches, made on the training device: ``draw`` decides what happens to each image, ``apply`` does it.

What is drawn belongs to (seed, epoch, view, sample id): batch size, sharding, order and resuming do not change it. It
is drawn on the CPU, so ``apply`` knows there which images an operation concerns and never waits for the device. The
operations are those of torchvision.transforms.v2 on float tensors (bilinear with antialiasing), in BYOL's order: crop
and flip in one resampling, colour jitter, greyscale, blur, solarisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    "Parameters",
    "Views",
    "apply",
    "byol_pair",
    "draw",
    "finish_views",
    "make_views",
    "multi_crop",
]

Images = Tensor | Sequence[Tensor]

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}  # of one pass: what stays in the caches, what stays small in memory


@dataclass(frozen=True)
class Parameters:
    """What happens to each image of a batch, on the CPU; ``size`` and ``kernel`` (of the blur) are pixels."""

    size: int
    kernel: int
    boxes: Tensor | None  # int64 (B, 4): top, left, height, width; None where crop and flip are done already
    flip: Tensor  # bool (B,)
    jitter: Tensor  # bool (B,)
    order: Tensor  # int64 (B, 4): the jitter's operations as they follow, by torchvision's numbers
    factors: Tensor  # float32 (B, 4): brightness, contrast, saturation, hue
    greyscale: Tensor  # bool (B,)
    sigma: Tensor  # float32 (B,) pixels, 0 where there is no blur
    solarise: Tensor  # bool (B,)

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, rows: slice) -> Parameters:
        """The parameters of some of the images."""
        boxes = None if self.boxes is None else self.boxes[rows]
        tensors = (self.flip, self.jitter, self.order, self.factors, self.greyscale, self.sigma, self.solarise)
        return Parameters(self.size, self.kernel, boxes, *(tensor[rows] for tensor in tensors))


def draw(
    augmentation: Augmentation,
    ids: Tensor,
    sizes: tuple[int, int] | Tensor | None,
    *,
    seed: int,
    epoch: int,
    view: int,
) -> Parameters:
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
    return Parameters(
        size=a.size,
        kernel=a.kernel,
        boxes=None if sizes is None else draw_boxes(a, ids, sizes, seed=seed, epoch=epoch, view=view),
        flip=draw_flips(a, ids, seed=seed, epoch=epoch, view=view),
        jitter=chance[:, 1] < a.jitter,
        order=amount[:, :4].argsort(1),
        factors=low + amount[:, 4:8] * (high - low),
        greyscale=chance[:, 2] < a.greyscale,
        sigma=torch.where(chance[:, 3] < a.blur, sigma, 0.0),
        solarise=chance[:, 4] < a.solarise,
    )


@torch.no_grad()
def apply(
    images: Images,
    parameters: Parameters,
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
    scale, shift = _affine_of(mean, std, device)
    step = max(1, _CHUNK_VALUES.get(device.type, 2**26) // (3 * size * size))
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        view = _unnormalised(images[rows], parameters.rows(rows))
        views[rows].copy_(view.mul_(scale).add_(shift))
    return views


def _unnormalised(images: Images, p: Parameters) -> Tensor:
    if p.boxes is not None:
        x = crop(images, p.boxes, p.flip, p.size)
    elif isinstance(images, Tensor) and images.shape[1:] == (3, p.size, p.size):
        x = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    else:
        raise UsageError(f"expected images cropped to (3, {p.size}, {p.size}), got {tuple(images[0].shape)}")
    if p.jitter.any():
        jitter_(x, p.order, p.factors, p.jitter)
    on_rows_(x, _where(p.greyscale), lambda part, _: greyscale_(part))
    on_rows_(x, _where(p.sigma), lambda part, rows: part.copy_(gaussian_blur(part, p.sigma[rows], p.kernel)))
    on_rows_(x, _where(p.solarise), lambda part, _: solarise_(part))
    return x


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _affine_of(
    mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale and shift (3, 1, 1) that normalise: x * scale + shift = (x - mean) / std."""
    scale = 1 / torch.tensor((1.0, 1.0, 1.0) if std is None else std)
    shift = -torch.tensor((0.0, 0.0, 0.0) if mean is None else mean) * scale
    return scale.view(3, 1, 1).to(device, non_blocking=True), shift.view(3, 1, 1).to(device, non_blocking=True)


def make_views(
    images: Images,
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
    return [
        apply(
            images,
            draw(augmentation, ids, sizes, seed=seed, epoch=epoch, view=number),
            mean=mean,
            std=std,
            channels_last=channels_last,
        )
        for number, augmentation in enumerate(views)
    ]


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
    return [
        apply(
            cropped,
            draw(augmentation, ids, None, seed=seed, epoch=epoch, view=number),
            mean=mean,
            std=std,
            channels_last=channels_last,
        )
        for number, (augmentation, cropped) in enumerate(zip(views, crops, strict=True))
    ]
