"""One encoded image to uint8 pixels, exactly as torchvision's Resize and CenterCrop give them on PIL images."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
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
_CLEAR = (ValueError, Image.DecompressionBombError)  # in words for a person; what decoders raise often is not

# What is decoded. PIL knows 30 more, some of which ask other programs: it hands PostScript to Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MOST_RESIZED = 2**26  # pixels of an image once its shorter side is resized, before it is cropped

_BITS_PER_SAMPLE, _MAX_VALUE = 258, (341, 281)  # TIFF: SMaxSampleValue, MaxSampleValue
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF; these swap height and width


def output_size(target: Target) -> Size:
    """Height and width of what ``decode`` returns for this target."""
    return (target.size, target.size) if isinstance(target, Geometry) else target


class Header(NamedTuple):
    """What a file says of its image before it is decoded."""

    size: Size
    deep: bool  # more than 8 bits of grey: scaled by ``value_range``


def header(stream: BinaryIO, *, exif: bool = False) -> Header:
    """The size as ``decode`` gives it, and whether pixels are scaled; nothing is decoded. Raises one of UNREADABLE."""
    with open_image(stream) as image:
        height, width = int(image.height), int(image.width)
        turned = exif and image.getexif().get(_ORIENTATION) in _TURNED
        return Header((width, height) if turned else (height, width), _is_deep(image))


def decode(stream: BinaryIO, target: Target, *, exif: bool = False, odd: bool = False) -> NDArray[np.uint8]:
    """The image as RGB, uint8 (3, H, W). Raises one of UNREADABLE, also where a fixed-size set has an odd image.

    ``exif`` turns it as its EXIF orientation says; ``odd`` resizes and centre-crops one that has not the set's size.
    """
    with open_image(stream) as image, _quiet_libtiff(image):
        if isinstance(target, Geometry):
            _refuse_thin((image.height, image.width), target)
        whole = upright(image) if exif else image
        if not (odd or isinstance(target, Geometry) or (whole.height, whole.width) == target):
            raise ValueError(f"{whole.height}x{whole.width} pixels, but the set's first ones {target[0]}x{target[1]}")
        rgb = to_rgb(whole)
    if not isinstance(target, Geometry) and (rgb.height, rgb.width) != target:
        rgb = ImageOps.fit(rgb, (target[1], target[0]), Image.Resampling.BILINEAR)
    if isinstance(target, Geometry):
        shorter_side = round(target.size / target.crop_pct)
        rgb = F.resize(rgb, shorter_side, InterpolationMode(target.interpolation))
        rgb = F.center_crop(rgb, target.size)
    return np.asarray(rgb).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def open_image(stream: BinaryIO) -> Any:
    """A PIL image of one of FORMATS, its header read: more than 179 million pixels are refused by it."""
    return Image.open(stream, formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_thin(size: Size, target: Geometry) -> None:
    """ValueError for an image so thin that it would be gigabytes once its shorter side is resized."""
    shorter, longer = sorted(size)
    side = round(target.size / target.crop_pct)
    if side * (side * longer // max(shorter, 1)) > MOST_RESIZED:
        raise ValueError(f"{size[0]}x{size[1]} pixels are too thin to be resized to a shorter side of {side}")


@contextmanager
def _quiet_libtiff(image: Any) -> Iterator[None]:
    """While open, what libtiff writes right to the error output is dropped: of a damaged file, hundreds of lines.

    Only for TIFFs, as whatever else is written meanwhile is dropped too. That the file cannot be read is raised.
    """
    if image.format != "TIFF":
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def to_rgb(image: Any) -> Any:
    """A PIL image as RGB, alpha dropped, as torchvision does; more than 8 bits of grey are scaled by their range.

    Of 16-bit colour PIL itself keeps the high byte.
    """
    if _is_deep(image):  # convert() would clip at 255
        values = np.asarray(image).astype(np.float64)
        scaled = np.rint(values * (255 / value_range(image, values)))
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def value_range(image: Any, values: NDArray[np.float64]) -> float:
    """The value that is white in an image of more than 8 bits of grey; black is 0. It depends on this image alone.

    A TIFF's own MaxSampleValue or SMaxSampleValue where it has one, for integers taken to the next 2^bits - 1, as
    some writers store the brightest pixel (12-bit pictures in 16 bits: 4095); else the largest number of its bits up
    to 16; else, for 32-bit integers, which no camera fills, 255 or 65535, the smaller that holds the image's values;
    else 1 for floats. Raises ValueError where values lie outside.
    """
    low, high = float(values.min(initial=0)), float(values.max(initial=0))  # NaN where there is one
    white = _white_by_tag(image) or _white_by_type(image, high)
    if not (low >= 0 and high <= white):
        raise ValueError(
            f"{_kind(image)} pixels from {low:g} to {high:g} where 0 to {white:g} is expected: "
            "save it in that range, or with its largest value in the tag SMaxSampleValue"
        )
    return white


def _white_by_tag(image: Any) -> float | None:
    tags = getattr(image, "tag_v2", {})
    given: Any = next((tags[tag] for tag in _MAX_VALUE if tag in tags), None)
    try:
        most = float(given[0] if isinstance(given, tuple) else given)
    except (TypeError, ValueError, IndexError):
        return None
    if not (math.isfinite(most) and most > 0):
        return None
    return most if image.mode == "F" else float((1 << math.ceil(most).bit_length()) - 1)


def _white_by_type(image: Any, high: float) -> float:
    if image.mode == "F":
        return 1.0
    stored = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    if stored is None:
        return float(0xFFFF)  # PNG, and PGM, which PIL spreads over 16 bits
    bits = int(stored[0])
    if bits > 16:
        return 255.0 if high <= 255 else float(0xFFFF)
    return float((1 << (bits - 1 if image.mode == "I" else bits)) - 1)  # PIL reads signed ones as "I"


def _is_deep(image: Any) -> bool:
    return bool(image.mode == "F" or image.mode.startswith("I"))


def _kind(image: Any) -> str:
    return {"F": "float", "I": "integer"}.get(image.mode, "16-bit")


def upright(image: Any) -> Any:
    """A PIL image turned as its EXIF orientation says; itself where it needs no turning."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def reason(error: BaseException) -> str:
    """Why an image could not be read, in a few words without addresses or line breaks."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return error.strerror  # its path is named beside it
    words = str(error).partition("\n")[0] or type(error).__name__
    return words if isinstance(error, _CLEAR) else f"cannot be decoded: {words}"
