"""The gallery: one photograph under all corruptions at five severities, ours beside imagecorruptions'.

torch is imported when it is drawn.
"""

from __future__ import annotations

import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coss_eval.corruptions.names import CATEGORY, NAMES, SEVERITIES, VALIDATION
from coss_eval.errors import UsageError
from coss_eval.reports.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from coss_eval.corruptions.engine import Backend
    from coss_eval.data.images import Pixels

TITLES: dict[Backend, str] = {"native": "coss-eval", "reference": "imagecorruptions 1.1.2"}
SIDE = 224  # px: what is corrupted, with ImageNet-C's table
GAP = 2
BETWEEN = 18  # between backends
HEAD, MARGIN = 44, 8
LABELS = 128  # width of the names
INK, FAINT = (34, 34, 34), (119, 119, 119)


def gallery(
    out: Path, *, image: Path | None = None, backends: tuple[Backend, ...] = ("native",), seed: int = 0
) -> Path:
    """Write gallery.png into ``out``: a row a corruption, a block of five severities a backend; its path.

    ``image`` is any photograph; scikit-learn's china.jpg where none is given. It is resized and centre-cropped to
    224 px, corrupted at that size, and shown smaller. The two backends' random draws differ, their statistics do not.
    Raises UsageError for a file that is no image.
    """
    photograph = read_photograph(image)
    thumb = 112 if len(backends) > 1 else 144
    block = len(SEVERITIES) * (thumb + GAP) - GAP
    width = MARGIN + LABELS + len(backends) * block + (len(backends) - 1) * BETWEEN + MARGIN
    page = Image.new("RGB", (width, HEAD + len(NAMES) * (thumb + GAP) + MARGIN), "white")
    for number, backend in enumerate(backends):
        left = MARGIN + LABELS + number * (block + BETWEEN)
        _write_head(page, left, TITLES[backend], thumb)
        for row, name in enumerate(NAMES):
            for column, severity in enumerate(SEVERITIES):
                shown = _thumbnail(_corrupted(photograph, name, severity, backend, seed), thumb)
                page.paste(shown, (left + column * (thumb + GAP), HEAD + row * (thumb + GAP)))
    _write_names(page, thumb)
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", optimize=True)
    return write_file(out / "gallery.png", buffer.getvalue())


def read_photograph(file: Path | None) -> Tensor:
    """uint8 (1, 3, 224, 224) of an image file, resized and centre-cropped as ImageNet's."""
    import torch

    from coss_eval.data.batches import Geometry
    from coss_eval.data.decode import UNREADABLE, decode, reason

    sample = resources.files("sklearn.datasets.images").joinpath("china.jpg")
    try:
        content = sample.read_bytes() if file is None else file.read_bytes()
        pixels = decode(io.BytesIO(content), Geometry(SIDE))
    except UNREADABLE as error:
        raise UsageError(f"cannot read {file} as an image: {reason(error)}") from error
    return torch.from_numpy(np.ascontiguousarray(pixels))[None]


def _corrupted(photograph: Tensor, name: str, severity: int, backend: Backend, seed: int) -> Pixels:
    import torch

    from coss_eval.corruptions import corrupt

    ids = torch.zeros(1, dtype=torch.int64)
    done = corrupt(photograph, name, severity, ids, seed=seed, table="imagenet", backend=backend)
    pixels: Pixels = done[0].permute(1, 2, 0).numpy()  # (H, W, 3)
    return pixels


def _thumbnail(pixels: Pixels, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)


def _write_head(page: Image.Image, left: int, title: str, thumb: int) -> None:
    draw = ImageDraw.Draw(page)
    draw.text((left, 6), title, INK, _font(13))
    for column, severity in enumerate(SEVERITIES):
        centre = left + column * (thumb + GAP) + thumb / 2
        draw.text((centre, HEAD - 4), f"severity {severity}" if column == 0 else str(severity), FAINT, _font(11), "ms")


def _write_names(page: Image.Image, thumb: int) -> None:
    draw = ImageDraw.Draw(page)
    for row, name in enumerate(NAMES):
        middle = HEAD + row * (thumb + GAP) + thumb / 2
        draw.text((MARGIN, middle), name.replace("_", " "), INK, _font(13), "lb")
        about = CATEGORY[name] + (", validation" if name in VALIDATION else "")
        draw.text((MARGIN, middle + 2), about, FAINT, _font(10), "lt")


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
