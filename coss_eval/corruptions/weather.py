"""Snow, frost, fog, brightness and spatter.

Brightness' HSV round trip is done in closed form: changing V alone scales a pixel's channels by V'/V.

Differences between the flavours (imagecorruptions against the original ImageNet-C code):
- frost: the textures are enlarged by 1.1 (bicubic) before they are cropped;
- snow: the zoomed layer is cropped from its top-left corner after the motion blur, not from its centre before it; it is
  rounded to 8 bits after the blur alone, where the original truncates it to 8 bits before, too.

Spatter's water is traced with OpenCV on the CPU, image by image, whatever the device: Canny's hysteresis and the
chamfer distance are sequential. It depends on the random layer alone, never on the image.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from coss_eval.corruptions.blur import smeared, zoomed
from coss_eval.corruptions.filters import smooth, to_pixels
from coss_eval.corruptions.package import package_folder
from coss_eval.corruptions.registry import MIN_SIDE, corruption
from coss_eval.corruptions.severity import Setting, TableName
from coss_eval.runtime.lazy import lazy

if TYPE_CHECKING:
    import cv2
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from coss_eval.corruptions.draws import Draws
else:
    cv2, np, torch = map(lazy, ("cv2", "numpy", "torch"))

# frost6.jpg lies in the folder too, but the published code never draws it.
_TEXTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
_TEXTURE_SCALE: dict[TableName, float] = {"imagenet": 1.0, "tiny-imagenet": 0.3, "cifar": 0.2}
_WATER = (175.0, 238.0, 238.0)
_MUD = (63.0, 42.0, 20.0)


@corruption(
    "snow",
    min_side=MIN_SIDE,
    category="weather",
    set="benchmark",
    severities={  # mean, standard deviation, zoom, threshold, radius, sigma, weight of the image
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "tiny-imagenet": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    },
)
def snow(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """A whitened image under motion-blurred flakes, and the same flakes turned by 180 degrees."""
    mean, deviation, zoom, threshold, radius, sigma, weight = setting.parameters
    height, width = images.shape[-2:]
    original = setting.flavour == "imagenet-c"
    layer = draws.normal(1, height, width).mul_(deviation).add_(mean)  # (B, 1, H, W)
    layer = zoomed(layer, zoom, (height, width) if original else None, centred=original)
    layer = layer.masked_fill_(layer < threshold, 0).clamp_(0, 1).mul_(255)
    angle = draws.uniform(1)[:, 0].double() * 90 - 135
    layer = smeared(layer.floor_() if original else layer, angle, int(radius), sigma, cut=not original)
    layer = layer.round_()[..., :height, :width]
    x = images.float()
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    white = x.maximum(grey.mul_(1.5).add_(127.5))
    return to_pixels(x.mul_(weight).add_(white, alpha=1 - weight).add_(layer).add_(layer.flip(-2, -1)))


@corruption(
    "frost",
    min_side=MIN_SIDE,
    category="weather",
    set="benchmark",
    severities={  # weight of image, of texture
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "tiny-imagenet": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    },
)
def frost(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """a x + b times a random crop of one of five photographs of frost."""
    weight, texture_weight = setting.parameters
    height, width = images.shape[-2:]
    scale = _TEXTURE_SCALE[setting.table]
    textures = frost_textures(height, width, scale, setting.flavour == "imagecorruptions")
    crops = []
    for which, down, right in draws.uniform(3).tolist():
        texture = textures[int(which * len(textures))]
        top = int(down * (texture.shape[-2] - height))
        left = int(right * (texture.shape[-1] - width))
        crops.append(texture[:, top : top + height, left : left + width])
    return to_pixels(torch.stack(crops).to(images.device) * texture_weight + images * weight)


@lru_cache(maxsize=8)
def frost_textures(height: int, width: int, scale: float, enlarged: bool) -> tuple[Tensor, ...]:
    """The five textures, uint8 (3, h, w), larger than (height, width), scaled; ``enlarged`` by 1.1 more, bicubic."""
    textures = []
    for name in _TEXTURES:
        texture: npt.NDArray[Any] = np.asarray(cv2.imread(str(package_folder() / "frost" / name)))
        needed = max((height + (not enlarged)) / texture.shape[0], (width + (not enlarged)) / texture.shape[1])
        factor = max(scale, needed) * (1.1 if enlarged else 1)
        if factor != 1:
            size = (math.ceil(texture.shape[1] * factor), math.ceil(texture.shape[0] * factor))
            texture = cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_LINEAR)
        textures.append(torch.from_numpy(texture[..., ::-1].transpose(2, 0, 1).copy()))
    return tuple(textures)


@corruption(
    "fog",
    min_side=MIN_SIDE,
    category="weather",
    set="benchmark",
    severities={  # amount, decay
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "tiny-imagenet": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    },
)
def fog(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """(x + c m) max / (max + c) with a plasma fractal m and the image's largest value max."""
    amount, decay = setting.parameters
    height, width = images.shape[-2:]
    haze = plasma(draws, 1 << (max(height, width) - 1).bit_length(), decay)[:, None, :height, :width]
    brightest = images.amax(dim=(1, 2, 3)).float().div_(255).view(-1, 1, 1, 1)
    return to_pixels(images.float().add_(haze.mul_(255 * amount)).mul_(brightest / (brightest + amount)))


def plasma(draws: Draws, side: int, decay: float) -> Tensor:
    """Diamond-square height maps (B, side, side) in [0, 1]; ``side`` is a power of two, and edges wrap around."""
    jitter = draws.signed(side * side - 1)  # in the order of use: 3 n^2 on the level of n x n squares
    jitter *= _amplitudes(side, decay).to(jitter.device)
    field = jitter.new_zeros(len(jitter), 1, 1)  # the corners of the squares, (B, n, n)
    while field.shape[-1] < side:
        field = _refined(field, jitter)
    lowest = field.amin(dim=(1, 2), keepdim=True)
    highest = field.amax(dim=(1, 2), keepdim=True)
    return field.sub_(lowest).div_(highest - lowest)


def _refined(field: Tensor, jitter: Tensor) -> Tensor:
    """The next level (B, 2 n, 2 n) of (B, n, n): between the corners, means of their neighbours plus jitter."""
    count = field.shape[-1]
    noise = jitter[:, count**2 - 1 : 4 * count**2 - 1].view(-1, 3, count, count).unbind(1)  # n^2 - 1 were used before
    across, down = field + field.roll(-1, 2), field + field.roll(-1, 1)
    centres = (across + across.roll(-1, 1)).mul_(0.25).add_(noise[0])
    right = across.add_(centres).add_(centres.roll(1, 1)).mul_(0.25).add_(noise[1])
    below = down.add_(centres).add_(centres.roll(1, 2)).mul_(0.25).add_(noise[2])
    # Neighbours in a row as one complex number: torch interleaves two maps several times faster so.
    rows = torch.stack([torch.complex(field, right), torch.complex(below, centres)], dim=2)  # (B, n, 2, n)
    return torch.view_as_real(rows).view(-1, 2 * count, 2 * count)


@lru_cache(maxsize=16)
def _amplitudes(side: int, decay: float) -> Tensor:
    """How far each draw of ``plasma`` reaches (side^2 - 1,): 100^2, and 1 / decay^2 of it from level to level."""
    levels = side.bit_length() - 1
    return torch.cat([torch.full((3 * 4**level,), (100.0 / decay**level) ** 2) for level in range(levels)])


@corruption(
    "brightness",
    category="weather",
    set="benchmark",
    severities={  # added to V of HSV
        "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
        "tiny-imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
        "cifar": (0.05, 0.1, 0.15, 0.2, 0.3),
    },
)
def brightness(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """V + c in HSV."""
    (amount,) = setting.parameters
    value = images.amax(dim=1, keepdim=True).float()  # (B, 1, H, W), V
    raised = (value + 255 * amount).clamp_(max=255)
    scaled = images * (raised / value.clamp(min=1))
    return to_pixels(torch.where(value > 0, scaled, raised))


@corruption(
    "spatter",
    min_side=MIN_SIDE,
    category="weather",
    set="validation",
    severities={  # mean, standard deviation, sigma, threshold, strength (water) or sigma (mud), 1 where it is mud
        "imagenet": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "tiny-imagenet": (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        "cifar": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    },
    image_by_image=True,
    on_cpu=(1, 2, 3),  # water
)
def spatter(images: Tensor, setting: Setting, draws: Draws) -> Tensor:
    """Drops of water (severity 1 to 3) or splashes of mud (4, 5) on the lens."""
    mean, deviation, sigma, threshold, strength, is_mud = setting.parameters
    height, width = images.shape[-2:]
    layer = smooth(draws.normal(height, width).mul_(deviation).add_(mean), sigma)  # (B, H, W)
    if is_mud:
        opacity = smooth((layer > threshold).float(), strength)[:, None]
        opacity = opacity.masked_fill_(opacity < 0.8, 0)
        return to_pixels(images * (1 - opacity) + opacity * images.new_tensor(_MUD, dtype=torch.float32).view(3, 1, 1))
    liquid = layer.masked_fill_(layer < threshold, 0).mul_(255).clamp_(max=255).to(torch.uint8)
    drops = torch.from_numpy(np.stack([_drops(one) for one in liquid.cpu().numpy()]))[:, None].to(images.device)
    return to_pixels(images + drops.mul_(strength) * images.new_tensor(_WATER, dtype=torch.float32).view(3, 1, 1))


def _drops(liquid: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """How strongly water brightens each pixel, (H, W) in [0, 1]: thickness times embossed distance from edges."""
    distance: npt.NDArray[Any] = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss)
    drops: npt.NDArray[np.float32] = liquid * cv2.blur(relief, (3, 3)).astype(np.float32)
    return drops / max(float(drops.max()), 1.0)  # 0 where no drop fell
