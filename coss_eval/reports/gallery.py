"""Galleries: one photograph under all corruptions, ours beside imagecorruptions'; images that attacks have changed.

torch is imported when they are drawn.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from coss_eval.corruptions.names import CATEGORY, NAMES, SEVERITIES, VALIDATION
from coss_eval.errors import CossError, UsageError
from coss_eval.reports.drawing import BETTER, SMALLEST, WIDTH, WORSE, Figure, style
from coss_eval.reports.files import write_file
from coss_eval.reports.layout import broken

if TYPE_CHECKING:
    from torch import Tensor

    from coss_eval.checkpoints.as_model import ModelLike
    from coss_eval.corruptions.engine import Backend
    from coss_eval.data.as_dataset import DatasetLike
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


@dataclass(frozen=True)
class Attacked:
    """Images (N, H, W, 3), as they are and under each eps (E, N, H, W, 3), all in [0, 1], and what is seen in them.

    ``truth`` and ``clean``: the names of the class and of the one predicted, (N,); ``seen``: predicted under each eps.
    """

    title: str
    images: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    eps: tuple[float, ...]
    truth: tuple[str, ...]
    seen: tuple[tuple[str, ...], ...]


def attacked(
    model: ModelLike,
    data: DatasetLike,
    *,
    eps: Sequence[float] = (1 / 255, 4 / 255),
    norm: str = "linf",
    steps: int = 20,
    images: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> Attacked:
    """The first test images that a network classifies rightly, under PGD at each eps.

    By its own head where its class names match the data's, else by a linear probe. Raises CossError where it
    classifies fewer than one of the images that are looked at rightly.
    """
    import torch

    from coss_eval.attacks import pgd
    from coss_eval.data.as_dataset import dataset_of
    from coss_eval.models.classifier import to_float
    from coss_eval.probes import fit_classifier

    if images < 1 or not eps:
        raise UsageError(f"expected one image and one eps at least, got {images} and {len(eps)}")
    dataset = dataset_of(data)
    classifier = fit_classifier(model, dataset, device=device)
    looked_at = dataset.test.limited(16 * images, seed)
    batch = next(looked_at.batches(classifier.preprocessing.geometry, batch_size=len(looked_at)))
    place = next(classifier.parameters()).device
    pixels, labels = to_float(batch.images).to(place), batch.labels.to(place)
    with torch.no_grad():
        right = (classifier(pixels).argmax(1) == labels).nonzero()[:images, 0]
    if not len(right):
        raise CossError(f"none of {len(looked_at)} images is classified rightly without an attack: nothing to show")
    pixels, labels = pixels[right], labels[right]
    rising = tuple(sorted(eps))
    found = pgd(classifier, pixels, labels, rising, batch.ids.to(place)[right], norm=norm, steps=steps, seed=seed)
    under = [found.adversarial(e) for e in range(len(rising))]
    names = dataset.classes
    with torch.no_grad():
        seen = [tuple(names[i] for i in classifier(one).argmax(1).tolist()) for one in under]
    shown = [one.permute(0, 2, 3, 1).cpu().numpy() for one in (pixels, *under)]
    name = "Linf" if norm == "linf" else norm.upper()
    title = f"PGD, {name}, {steps} steps; what a smaller eps broke stays as it was broken"
    return Attacked(title, shown[0], np.stack(shown[1:]), rising, tuple(names[i] for i in labels.tolist()), tuple(seen))


def draw_attacked(found: Attacked, *, width: float = WIDTH) -> Figure:
    """A row an image: clean, under each eps, and the last perturbation made visible; what is seen below each.

    A prediction that the attack has changed is bold and orange.
    """
    with style():
        columns = len(found.eps) + 2
        side = width / columns
        figure = Figure(figsize=(width, (side + 0.22) * len(found.images) + 0.55), layout="constrained")
        axes = figure.subplots(len(found.images), columns, squeeze=False)
        change = found.adversarial[-1] - found.images
        largest = float(np.abs(change).max()) or 1.0
        heads = ["clean", *(f"eps {eps * 255:.3g}/255" for eps in found.eps), f"change × {0.5 / largest:.0f}"]
        for row, truth in enumerate(found.truth):
            pictures = [found.images[row], *found.adversarial[:, row], 0.5 + 0.5 * change[row] / largest]
            words = [truth, *(seen[row] for seen in found.seen), ""]
            for axis, picture, word in zip(axes[row], pictures, words, strict=True):
                axis.imshow(picture.clip(0, 1), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
                wrong = word not in ("", truth)
                text = "\n".join(broken(word, max(6, int(side * 72 / 3.6)))[:2])
                weight = "bold" if wrong else "normal"
                axis.set_xlabel(
                    text, fontsize=SMALLEST, color=WORSE if wrong else BETTER, fontweight=weight, labelpad=2
                )
        for axis, head in zip(axes[0], heads, strict=True):
            axis.set_title(head, fontsize=7)
        figure.suptitle("\n".join(broken(found.title, int(width * 15))), fontsize=7, x=0.01, ha="left")
        return figure
