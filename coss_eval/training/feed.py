"""Training images by epoch: a shuffled order that depends on (seed, epoch) alone, each rank's share of every batch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coss_eval.data.batches import Geometry
from coss_eval.data.choose import Ints
from coss_eval.data.images import processors
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.probes.forward import ahead
from coss_eval.runtime.background import in_background
from coss_eval.runtime.processes import rank, world_size
from coss_eval.views.augmentation import Views
from coss_eval.views.crop_files import crop_batches
from coss_eval.views.make import ViewParameters, draw_views

DEVICE_SHARE = 0.4  # of a GPU's free memory, for images that stay there
STATIC_VALUES = 2**24  # of a batch's view: up to here a GPU's views are bound by launches (H200: 64 px yes, 224 no)
CROPPED = 32  # images that a worker hands over at once: workers share a batch, and hold two of these each
DRAWN_AHEAD = 32  # steps whose views are drawn together, as a draw is some 200 small operations


class BatchPart(NamedTuple):
    """One rank's part of a batch: pixels uint8 on the device, labels int64 (B,) and ids int64 (B,) on the CPU."""

    pixels: list[Tensor]  # the images (B, 3, H, W), or their crop (B, 3, S, S) for every view where files are read
    labels: Tensor
    ids: Tensor
    drawn: list[ViewParameters] | None = None  # of every view, where they were drawn ahead

    def chunks(self, number: int) -> list[BatchPart]:
        """Micro-batches."""
        pixels = zip(*(tensor.chunk(number) for tensor in self.pixels), strict=True)
        rest = zip(self.labels.chunk(number), self.ids.chunk(number), strict=True)
        return [BatchPart(list(crops), labels, ids) for crops, (labels, ids) in zip(pixels, rest, strict=True)]

    def draws(self, views: Views, *, seed: int, epoch: int) -> list[ViewParameters]:
        """What happens to each image in every view, where crops are not made already."""
        if self.drawn is not None:
            return self.drawn
        sizes = None if len(self.pixels) > 1 else (self.pixels[0].shape[2], self.pixels[0].shape[3])
        return draw_views(views, self.ids, sizes, seed=seed, epoch=epoch)


class Feed:
    """The parts of every batch of an epoch.

    Images of one small size lie in the GPU's memory where they fit, else in the machine's; files of other sizes are
    decoded and cropped by worker processes (``from_files``). ``batch_size`` is that of all ranks together; the rest of
    an epoch that fills no batch is left out, another one in each epoch. Where bad images are skipped, others of the
    batch stand in for them, so that every part has its size. ``static`` says that views are to be made by the same
    work for every draw.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device, *, seed: int, views: Views) -> None:
        ranks = world_size()
        if len(split) < batch_size:
            raise UsageError(
                f"{len(split):,} training images are fewer than a batch of {batch_size}; take a smaller one"
            )
        if batch_size % ranks or batch_size // ranks < 2:
            raise UsageError(f"a batch of {batch_size} cannot be shared by {ranks} processes, two images or more each")
        self.split, self.batch_size, self.device, self.seed, self.views = split, batch_size, device, seed, views
        self.share = batch_size // ranks
        self.from_files = split.native_size is None
        largest = max(view.size for view in views)
        self.static = device.type == "cuda" and self.share * 3 * largest**2 <= STATIC_VALUES
        self._resident = self._load() if device.type == "cuda" and not self.from_files else None

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.split) // self.batch_size

    def order(self, epoch: int) -> Ints:
        """The images of an epoch in the order of all ranks together, (steps, batch_size)."""
        shuffled = self.split.shuffled(np.random.default_rng([self.seed, epoch]))
        return shuffled[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[BatchPart]:
        """This rank's part of every batch of an epoch from step ``start`` on; nothing before it is read."""
        for part in self._parts(number, start):
            yield part if len(part.ids) == self.share else _filled(part, self.share)

    def _parts(self, number: int, start: int) -> Iterator[BatchPart]:
        places = self.order(number)[start:, rank() * self.share : (rank() + 1) * self.share]
        if self.from_files:
            yield from in_background(self._cropped(places, number))
        elif self._resident is not None:
            yield from self._on_device(places, number, *self._resident)
        else:
            part = self.split.subset(places.ravel())
            for batch in ahead(part.batches(batch_size=self.share), self.device):
                yield BatchPart([batch.images], batch.labels, batch.ids)

    def _cropped(self, places: Ints, epoch: int) -> Iterator[BatchPart]:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
        workers = max(1, processors() // here)
        pieces = math.ceil(self.share / CROPPED)  # of a batch
        parts = [piece for part in places for piece in np.array_split(part, pieces)]
        crops = crop_batches(self.split, parts, self.views, seed=self.seed, epoch=epoch, workers=workers)
        for _ in places:
            views, labels, ids = zip(*islice(crops, pieces), strict=True)
            joined = [torch.cat(each) for each in zip(*views, strict=True)]
            pinned = [view.pin_memory() if self.device.type == "cuda" else view for view in joined]
            there = [view.to(self.device, non_blocking=True) for view in pinned]
            yield BatchPart(there, torch.cat(labels), torch.cat(ids))

    def _on_device(self, places: Ints, epoch: int, images: Tensor, labels: Tensor, ids: Tensor) -> Iterator[BatchPart]:
        sizes = (images.shape[2], images.shape[3])
        for block in torch.split(torch.from_numpy(places), DRAWN_AHEAD):
            here = block.flatten()
            drawn = draw_views(self.views, ids[here], sizes, seed=self.seed, epoch=epoch)
            drawn = [each.on(self.device) for each in drawn] if self.static else drawn
            for step, (chosen, there) in enumerate(zip(block, block.to(self.device), strict=True)):
                rows = slice(step * self.share, (step + 1) * self.share)
                yield BatchPart([images[there]], labels[chosen], ids[chosen], [each.rows(rows) for each in drawn])

    def _load(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """All images on the GPU, or None where they take too much of it."""
        batches = self.split.batches(batch_size=1024)
        first = next(batches)
        if len(self.split) * first.images[0].numel() > DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return None
        images = torch.empty(len(self.split), *first.images.shape[1:], dtype=torch.uint8, device=self.device)
        found, seen = [], 0
        for batch in chain([first], batches):
            images[seen : seen + len(batch.ids)] = batch.images.to(self.device)
            seen += len(batch.ids)
            found.append((batch.labels, batch.ids))
        if seen < len(self.split):  # unreadable ones, left out by the person's wish
            return None
        return images, torch.cat([labels for labels, _ in found]), torch.cat([ids for _, ids in found])


def _filled(part: BatchPart, count: int) -> BatchPart:
    """A part of ``count`` images: its own, over again where it has fewer."""
    if not len(part.ids):
        raise CossError("not one image of a batch can be read; mend or remove the files that cannot")
    chosen = torch.arange(count) % len(part.ids)
    return BatchPart(
        [pixels[chosen.to(pixels.device)] for pixels in part.pixels], part.labels[chosen], part.ids[chosen]
    )


def statistics(split: Split, geometry: Geometry | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], over all images (2,048 of large files)."""
    images = split if split.native_size is not None else split.limited(2048)
    count, total, square = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch in images.batches(geometry, batch_size=512):
        values = batch.images.transpose(0, 1).flatten(1).to(torch.float32).div_(255)  # (3, B * H * W)
        count += values.shape[1]
        total += values.sum(1, dtype=torch.float64)
        square += values.square_().sum(1, dtype=torch.float64)
    mean = total / count
    std = (square / count - mean.square()).clamp(min=1e-8).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
