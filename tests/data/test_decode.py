"""Decoding gives torchvision's pixels exactly, and RGB from whatever mode an image has."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin, TiffTags
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor
from written_datasets import image_of

from coss_eval.data.batches import Geometry
from coss_eval.data.decode import UNREADABLE, decode, header, reason
from coss_eval.data.open import load_dataset

GEOMETRIES = [
    Geometry(32, interpolation="bilinear"),
    Geometry(32, interpolation="bicubic"),
    Geometry(48, crop_pct=1.0),
    Geometry(40, crop_pct=0.7),
    Geometry(224),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equal_to_torchvision_on_pil_images(geometry: Geometry, varied: Path) -> None:
    reference = T.Compose(
        [
            T.Resize(round(geometry.size / geometry.crop_pct), InterpolationMode(geometry.interpolation)),
            T.CenterCrop(geometry.size),
            T.PILToTensor(),
        ]
    )
    split = load_dataset(varied).train
    assert split.native_size is None
    read = torch.cat([batch.images for batch in split.batches(geometry, batch_size=3)])
    assert read.dtype == torch.uint8
    for key, pixels in zip(split.keys, read, strict=True):
        assert torch.equal(pixels, reference(Image.open(varied / key).convert("RGB"))), key


def test_interpolations_are_pillows() -> None:
    for name in get_args(get_type_hints(Geometry)["interpolation"]):
        assert InterpolationMode(name)


def test_native_pixels_are_those_of_the_file() -> None:
    image = Image.fromarray(image_of("train", 0, 0))
    assert np.array_equal(decode(encode(image, "PNG"), (12, 12)), pil_to_tensor(image).numpy())


def encode(image: Any, kind: str, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


RGB = Image.fromarray(image_of("train", 1, 2))
GREY16 = (image_of("train", 0, 1)[..., 0].astype(np.uint16) << 8) + 77
GREY12, GREY8 = GREY16 >> 4, (GREY16 >> 8).astype(np.int32)
FLOAT = (GREY16 / 65535).astype(np.float32)
WHITE_80 = TiffImagePlugin.ImageFileDirectory_v2()
WHITE_80[341], WHITE_80.tagtype[341] = 80.0, TiffTags.FLOAT


def scaled(values: Any, white: float) -> Any:
    """Grey as 8 bits, by hand."""
    return Image.fromarray(np.floor(values.astype(np.float64) / white * 255 + 0.5).astype(np.uint8))


def pgm(values: Any, white: int) -> io.BytesIO:
    return io.BytesIO(f"P5 12 12 {white}\n".encode() + values.astype(">u2").tobytes())


EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees, which is ignored

MODES = {
    "grey": (encode(RGB.convert("L"), "PNG"), RGB.convert("L").convert("RGB"), 0),
    "grey with alpha": (encode(RGB.convert("LA"), "PNG"), RGB.convert("L").convert("RGB"), 0),
    "black and white": (encode(RGB.convert("1"), "PNG"), RGB.convert("1").convert("RGB"), 0),
    "palette": (encode(RGB.quantize(200), "PNG"), RGB.quantize(200).convert("RGB"), 0),
    "palette, see-through": (encode(RGB.quantize(200), "PNG", transparency=3), RGB.quantize(200).convert("RGB"), 0),
    "RGBA": (encode(RGB.convert("RGBA"), "PNG"), RGB, 0),
    "16-bit PNG": (encode(Image.fromarray(GREY16), "PNG"), scaled(GREY16, 65535), 0),
    "16-bit TIFF": (encode(Image.fromarray(GREY16), "TIFF"), scaled(GREY16, 65535), 0),
    "16-bit PGM": (pgm(GREY16, 65535), scaled(GREY16, 65535), 0),
    "12-bit PGM": (pgm(GREY12, 4095), scaled(GREY12, 4095), 0),
    "12 of 16 bits": (encode(Image.fromarray(GREY12), "TIFF", tiffinfo={281: 4095}), scaled(GREY12, 4095), 0),
    "the brightest of 12 bits": (
        encode(Image.fromarray(GREY12), "TIFF", tiffinfo={281: 3001}),
        scaled(GREY12, 4095),
        0,
    ),
    "32-bit TIFF, 8 used": (encode(Image.fromarray(GREY8), "TIFF"), scaled(GREY8, 255), 0),
    "32-bit TIFF, 16 used": (encode(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), scaled(GREY16, 65535), 0),
    "float TIFF": (encode(Image.fromarray(FLOAT), "TIFF"), scaled(FLOAT, 1), 0),
    "float TIFF with its range": (encode(Image.fromarray(FLOAT * 80), "TIFF", tiffinfo=WHITE_80), scaled(FLOAT, 1), 0),
    "CMYK TIFF": (encode(RGB.convert("CMYK"), "TIFF"), RGB, 0),
    "CMYK JPEG": (encode(Image.new("CMYK", (12, 12), (255, 0, 0, 0)), "JPEG"), Image.new("RGB", (12, 12), "cyan"), 3),
    "EXIF orientation": (encode(RGB, "PNG", exif=EXIF), RGB, 0),
    "two frames": (encode(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)], lossless=True), RGB, 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    stream, expected, tolerance = MODES[mode]
    pixels = decode(io.BytesIO(stream.getvalue()), (12, 12)).transpose(1, 2, 0).astype(int)
    assert np.abs(pixels - np.asarray(expected.convert("RGB")).astype(int)).max() <= tolerance
    assert header(io.BytesIO(stream.getvalue())).size == (12, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_only_where_it_is_asked_to(orientation: int) -> None:
    tall = RGB.resize((12, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(tall, "PNG", exif=exif).getvalue()
    assert header(io.BytesIO(content)).size == (20, 12)
    turned = np.asarray(tall)  # what a viewer does, by hand
    turned = turned if orientation < 5 else turned.transpose(1, 0, 2)
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    turned = turned[::-1] if orientation in (3, 4, 7, 8) else turned
    size = turned.shape[:2]
    assert header(io.BytesIO(content), exif=True).size == size
    assert np.array_equal(decode(io.BytesIO(content), size, exif=True).transpose(1, 2, 0), turned)


def test_an_odd_image_is_cut_to_the_sets_size() -> None:
    content = encode(RGB.resize((24, 12)), "PNG").getvalue()
    middle = np.asarray(RGB.resize((24, 12)))[:, 6:18]
    assert np.array_equal(decode(io.BytesIO(content), (12, 12), odd=True).transpose(1, 2, 0), middle)


WRONG = {
    "text": (b"no image at all", "not an image"),
    "nothing": (b"", "not an image"),
    "cut short": (encode(RGB.resize((90, 90)), "JPEG").getvalue()[:-200], "truncated"),
    "floats beyond 1": (encode(Image.fromarray(FLOAT * 80), "TIFF").getvalue(), "float pixels from .* where 0 to 1 is"),
    "not a number": (encode(Image.fromarray(FLOAT * np.nan), "TIFF").getvalue(), "from nan"),
    "negative": (encode(Image.fromarray(GREY8 - 300), "TIFF").getvalue(), "integer pixels from -298"),
    "beyond 16 bits": (encode(Image.fromarray(GREY8 * 70_000), "TIFF").getvalue(), "0 to 65535 is expected"),
    "another size": (encode(RGB.resize((13, 12)), "PNG").getvalue(), "12x13 pixels"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_read_says_why(wrong: str) -> None:
    content, why = WRONG[wrong]
    with pytest.raises(UNREADABLE) as caught:
        decode(io.BytesIO(content), (90, 90) if wrong == "cut short" else (12, 12))
    assert re.search(why, reason(caught.value))
    assert "0x" not in reason(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM", "GIF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_only_raise_what_is_counted(kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(RGB, kind).getvalue(), np.uint8)
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 6)] = rng.integers(0, 256, 6)
        damaged = damaged[: rng.integers(1, len(whole) + 1)]
        with contextlib.suppress(*UNREADABLE):
            assert decode(io.BytesIO(damaged.tobytes()), Geometry(16)).shape == (3, 16, 16)
