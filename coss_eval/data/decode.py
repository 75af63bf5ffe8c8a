"""One encoded image to uint8 pixels, exactly as torchvision's Resize and CenterCrop give them on PIL images."""

from __future__ import annotations

import struct
import zlib
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from coss_eval.data.batches import Geometry

Size = tuple[int, int]  # (height, width)
Target = Geometry | Size  # resize and crop, or the one size that every image of the set has

# What PIL and pyarrow raise on damaged files; the type errors come from damaged TIFF tags.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def output_size(target: Target) -> Size:
    """Height and width of what ``decode`` returns for this target."""
    return (target.size, target.size) if isinstance(target, Geometry) else target


def header_size(stream: BinaryIO) -> Size:
    """Height and width as the file's header has them; nothing is decoded. Raises one of UNREADABLE."""
    with Image.open(stream) as image:
        return int(image.height), int(image.width)


def decode(stream: BinaryIO, target: Target) -> NDArray[np.uint8]:
    """The image as RGB, uint8 (3, H, W). Raises one of UNREADABLE, also where a fixed-size set has an odd image."""
    with Image.open(stream) as image:
        if not isinstance(target, Geometry) and (image.height, image.width) != target:
            raise ValueError(f"{image.height}x{image.width} pixels, but the set's first ones {target[0]}x{target[1]}")
        rgb = to_rgb(image)
    if isinstance(target, Geometry):
        shorter_side = round(target.size / target.crop_pct)
        rgb = F.resize(rgb, shorter_side, InterpolationMode(target.interpolation))
        rgb = F.center_crop(rgb, target.size)
    return np.asarray(rgb).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def to_rgb(image: Any) -> Any:
    """A PIL image as RGB. EXIF orientation is ignored and alpha dropped, as torchvision does."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() clips at 255; 16-bit colour keeps its high byte too
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image.convert("RGB")


def reason(error: BaseException) -> str:
    """Why an image could not be read, in a few words without addresses or line breaks."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error).partition("\n")[0] or type(error).__name__
