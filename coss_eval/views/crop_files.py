"""Crops of image files of any size, decoded, cropped and flipped by worker processes; the device does the rest.

A file is decoded once for all of its views. What is drawn belongs to (seed, epoch, view, sample id), so the number of
workers and the batches do not change the crops; in training, ``finish_views`` applies the colour operations to them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from coss_eval.data.choose import Bools, Ints
from coss_eval.data.decode import UNREADABLE, open_image, reason, to_rgb, upright
from coss_eval.data.images import Images, in_workers, processors
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.views.random_crop import RandomCrop, draw_boxes, draw_flips

_KEEP = 2  # a JPEG may be decoded at a fraction of its size where every crop keeps this many pixels a pixel of its view


class CroppedBatch(NamedTuple):
    """One batch: a tensor uint8 (B, 3, S, S) for each view, cropped and flipped, and which samples they are of."""

    views: list[Tensor]
    labels: Tensor  # int64 (B,)
    ids: Tensor  # int64 (B,)


def crop_batches(
    split: Split,
    parts: Sequence[Ints],
    views: Iterable[RandomCrop],
    *,
    seed: int,
    epoch: int,
    purpose: str = "views",
    workers: int | None = None,
) -> Iterator[CroppedBatch]:
    """The images at the places ``parts`` of ``split``, one batch a part, in that order.

    For encoded images; sets of one small size are in memory, to be cropped there (``random_crop``). Images that cannot
    be read raise a CossError, or are left out of their batch where the split skips bad images. ``workers`` None starts
    as many as there are processors.
    """
    if split.native_size is not None:
        raise UsageError(f"the {split.name} images all have {split.native_size} pixels: crop them in memory")
    indices, ids = ([array[part] for part in parts] for array in (split.indices, split.ids))
    stream = {"seed": seed, "epoch": epoch, "purpose": purpose}
    work = _Cropper(split.images, indices, ids, tuple(views), stream)
    seen = 0
    for part, (crops, failures) in zip(
        parts, in_workers(work, len(parts), processors() if workers is None else workers), strict=True
    ):
        good: Bools = ~np.isin(split.indices[part], list(failures))
        split.images.bad.update(failures)
        seen += len(part)
        if failures and not split.skip_bad_images:
            raise split.bad_images_error(seen)
        yield CroppedBatch(
            [torch.from_numpy(view[good] if failures else view) for view in crops],
            torch.from_numpy(split.labels[part][good]),
            torch.from_numpy(split.ids[part][good]),
        )


class _Cropper(Dataset[tuple[list[NDArray[np.uint8]], dict[int, str]]]):
    """What a worker process gets; item n is the crops of batch n and why some of its images could not be read."""

    def __init__(
        self,
        images: Images,
        indices: list[Ints],
        ids: list[Ints],
        views: tuple[RandomCrop, ...],
        stream: Mapping[str, Any],
    ) -> None:
        self.images, self.indices, self.ids, self.views, self.stream = images, indices, ids, views, stream

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[list[NDArray[np.uint8]], dict[int, str]]:
        indices, failures = self.indices[number], dict[int, str]()
        crops = [np.zeros((len(indices), 3, view.size, view.size), np.uint8) for view in self.views]
        opened = [self._open(int(index), failures) for index in indices]
        sizes = torch.tensor([(image.height, image.width) if image else (1, 1) for image in opened])
        ids = torch.from_numpy(self.ids[number])
        views = [(view, {**self.stream, "view": number}) for number, view in enumerate(self.views)]
        boxes = np.stack([draw_boxes(view, ids, sizes, **stream).numpy() for view, stream in views], 1)  # (B, V, 4)
        flips = np.stack([draw_flips(view, ids, **stream).numpy() for view, stream in views], 1)  # (B, V)
        targets = np.array([view.size for view in self.views])
        for place in range(len(opened)):
            image, opened[place] = opened[place], None  # its pixels go with it
            if image is not None:
                try:
                    rgb, on_rgb = _decoded(image, boxes[place], targets)
                except UNREADABLE as error:
                    failures[int(indices[place])] = reason(error)
                    continue
                for crop, box, flip in zip(crops, on_rgb, flips[place], strict=True):
                    crop[place] = _cropped(rgb, box, crop.shape[-1], bool(flip))
        return crops, failures

    def _open(self, index: int, failures: dict[int, str]) -> Any:
        """The PIL image with its header read, or None and the reason in ``failures``."""
        try:
            image = open_image(io.BytesIO(self.images.raw(index)))
            return upright(image) if self.images.exif else image
        except UNREADABLE as error:
            failures[index] = reason(error)
            return None


def _decoded(image: Any, boxes: Ints, targets: Ints) -> tuple[Any, NDArray[np.float64]]:
    """The image as RGB, and the boxes (V, 4) on it, in fractions of its pixels.

    A JPEG larger than all of its crops need is decoded at 1/2, 1/4 or 1/8, which is several times as fast; its crops
    of photographs differ by about 1 of 255 in the mean from those of the whole image, more along sharp edges.
    """
    needed = _KEEP * (targets[:, None] / boxes[:, 2:]).max()  # share of the full size
    size, scale = image.size, np.ones(4)
    if needed <= 0.5:
        image.draft("RGB", (int(np.ceil(size[0] * needed)), int(np.ceil(size[1] * needed))))
        across, down = image.size[0] / size[0], image.size[1] / size[1]
        scale = np.array((down, across, down, across))
    return to_rgb(image), boxes * scale


def _cropped(rgb: Any, box: NDArray[np.float64], size: int, flip: bool) -> NDArray[np.uint8]:
    """uint8 (3, S, S). Cropped to whole pixels before it is resized, as PIL's ``box`` mixes in what lies beyond it."""
    top, left, height, width = box.tolist()
    row, column = math.floor(top), math.floor(left)
    bottom, right = min(rgb.height, math.ceil(top + height)), min(rgb.width, math.ceil(left + width))
    patch = rgb.crop((column, row, right, bottom))
    within = (left - column, top - row, min(left + width, right) - column, min(top + height, bottom) - row)
    pixels = np.asarray(patch.resize((size, size), Image.Resampling.BILINEAR, box=within)).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if flip else pixels
