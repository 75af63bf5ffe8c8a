"""Accuracy and stability of the representation under crops of the image: their area, place, resolution and number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_eval.data.batches import Batch
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.randomness import uniform
from coss_eval.runtime.background import in_background
from coss_eval.statistics import spread
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.crops import POSITIONS, CropsOptions
from coss_eval.tasks.task import Result, SplitName, Subject, Task, chance


@dataclass(frozen=True)
class Crops(CropsOptions, Task):
    """Parts of the test images in place of the whole; see CropsOptions. One cell per family.

    area: centre crops that cover ``areas`` of the image. position: crops of ``area`` at ``positions``. resolution: the
    whole image at ``scales`` of the input's side. pooled: the mean of the representations of ``counts`` crops of
    ``area`` at random places.
    """

    name: ClassVar[str] = "crops"

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        fixed = subject.model.backbone.img_size is not None
        scales = [scale for scale in self.scales if scale < 1 or not fixed]
        families: list[tuple[Any, dict[str, Any]]] = [
            (self.areas, {"family": "area", "areas": _rising((*self.areas, 1.0))}),
            (self.positions, {"family": "position", "positions": list(self.positions), "crop_area": self.area}),
            (scales, {"family": "resolution", "scales": _rising((*scales, 1.0))}),
            (self.counts, {"family": "pooled", "counts": _rising(self.counts), "crop_area": self.area, "seed": seed}),
        ]
        return [Cell(self.name, params) for options, params in families if options]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        params, family = cell.params, cell.params["family"]
        if family == "area":
            passes = len(params["areas"])  # the full images among them, which the others find in the cache
        elif family == "position":
            passes = len(params["positions"])
        elif family == "resolution":
            passes = sum(scale**2 for scale in params["scales"])
        else:
            passes = max(params["counts"])
        return float(len(subject.data.test) * passes)

    def reads(self, subject: Subject) -> list[SplitName]:
        return [*super().reads(subject), "test"]

    def measure(self, cell: Cell, subject: Subject) -> Result:
        device, classifier = subject.compute.device, subject.classifier
        full = subject.features(subject.data.test)
        features = full.values["global"]  # (N, D')
        mean = features.mean(0, dtype=torch.float64).to(device, torch.float32)
        cell, notes = _possible(cell, classifier, subject.image_size)
        found: list[list[_OfPart]] = []  # by batch and condition
        seen = 0
        for batch in in_background(subject.batches()):
            of_images = features[seen : seen + len(batch.ids)].to(device)
            found.append(_measured(cell, classifier, batch, of_images, mean))
            seen += len(batch.ids)
        whole = [_joined(parts) for parts in zip(*found, strict=True)]
        result = Result.of_verdicts("accuracy", full.ids.numpy(), ((f.condition, f.correct.numpy()) for f in whole))
        result.measurements += [_stability(f.condition, f.cosine) for f in whole]
        result.measurements.append(chance(subject, len(full.ids), **whole[0].condition))
        result.notes += [_about_the_head(classifier), *notes]
        return result


class _OfPart(NamedTuple):
    """What some images showed under one condition."""

    condition: dict[str, Any]
    correct: Tensor  # bool (B,)
    cosine: Tensor  # float32 (B,)


def _joined(parts: Sequence[_OfPart]) -> _OfPart:
    return _OfPart(parts[0].condition, torch.cat([p.correct for p in parts]), torch.cat([p.cosine for p in parts]))


@torch.inference_mode()
def _measured(cell: Cell, classifier: Classifier, batch: Batch, of_images: Tensor, mean: Tensor) -> list[_OfPart]:
    """One batch under all conditions of the cell; ``of_images`` (B, D') is what the full images give."""
    return [
        _OfPart(
            condition,
            (classifier.logits(of_crops).argmax(1) == batch.labels).cpu(),
            F.cosine_similarity(of_crops - mean, of_images - mean).cpu(),
        )
        for condition, of_crops in _representations(cell, classifier, batch, of_images)
    ]


def crop(pixels: Tensor, area: float, down: Tensor | float, right: Tensor | float) -> Tensor:
    """The part of each image (B, 3, H, W) that covers ``area`` of it, of the image's shape: (B, 3, h, w).

    ``down`` and ``right`` in [0, 1] are the shares of the height and width left over that lie above and left of the
    part, for all images or each (B,).
    """
    count, channels, height, width = pixels.shape
    device = pixels.device

    def indices(length: int, share: Tensor | float) -> Tensor:  # (B, kept)
        kept = max(1, round(area**0.5 * length))
        share = share if isinstance(share, Tensor) else torch.full((count,), share, device=device)
        start: Tensor = (share * (length - kept)).round().long()
        return start[:, None] + torch.arange(kept, device=device)

    image, channel = torch.arange(count, device=device), torch.arange(channels, device=device)
    rows, columns = indices(height, down), indices(width, right)
    return pixels[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _representations(
    cell: Cell, classifier: Classifier, batch: Batch, of_images: Tensor
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each condition of the cell with the global representations (B, D') of the batch under it."""
    params, pixels = cell.params, to_float(batch.images)
    family = {"family": params["family"]}
    if params["family"] == "area":
        for area in params["areas"]:
            found = of_images if area == 1 else _of_crops(classifier, pixels, area, 0.5, 0.5)
            yield family | {"area": area}, found
    elif params["family"] == "position":
        for position in params["positions"]:
            yield (
                family | {"position": position},
                _of_crops(classifier, pixels, params["crop_area"], *POSITIONS[position]),
            )
    elif params["family"] == "resolution":
        for scale in params["scales"]:
            yield family | {"scale": scale}, of_images if scale == 1 else _at_scale(classifier, pixels, scale)
    else:
        places = uniform(batch.ids, params["seed"], "crops", shape=(max(params["counts"]), 2))  # (B, crops, 2)
        total = torch.zeros_like(of_images)
        for number, (down, right) in enumerate(places.permute(1, 2, 0), start=1):
            total = total + _of_crops(classifier, pixels, params["crop_area"], down, right)
            if number in params["counts"]:
                yield family | {"crops": number}, total / number


def _of_crops(
    classifier: Classifier, pixels: Tensor, area: float, down: Tensor | float, right: Tensor | float
) -> Tensor:
    """Global representations of crops (see ``crop``) that are resized to the input's size."""
    resized = _resized(classifier, crop(pixels, area, down, right), _input_size(classifier, pixels.shape[2:]))
    representations: Tensor = classifier.backbone(classifier.normalise(resized))
    return representations


def _at_scale(classifier: Classifier, pixels: Tensor, scale: float) -> Tensor:
    """Global representations of whole images at ``scale`` times the input's size."""
    height, width = _input_size(classifier, pixels.shape[2:])
    resized = _resized(classifier, pixels, (max(1, round(scale * height)), max(1, round(scale * width))))
    if classifier.backbone.img_size is None:
        normalised = (resized - classifier.mean) / classifier.std
    else:
        normalised = classifier.normalise(resized)  # which brings them back to the only size it takes
    representations: Tensor = classifier.backbone(normalised)
    return representations


def _input_size(classifier: Classifier, image_size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of what the network sees of a full image."""
    side = classifier.preprocessing.img_size
    return (image_size[0], image_size[1]) if side is None else (side, side)


def _resized(classifier: Classifier, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    mode = classifier.preprocessing.interpolation
    return F.interpolate(pixels, size=size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def _possible(cell: Cell, classifier: Classifier, image_size: tuple[int, int]) -> tuple[Cell, list[str]]:
    """The cell without the scales at which this network fails, as on maps smaller than its kernels; notes on them."""
    if cell.params["family"] != "resolution":
        return cell, []
    notes, scales = [], []
    image = torch.zeros(1, 3, *image_size, device=classifier.mean.device)
    for scale in cell.params["scales"]:
        try:
            _at_scale(classifier, image, scale)
            scales.append(scale)
        except (RuntimeError, AssertionError) as error:  # torch's own, and what timm checks sizes with
            notes.append(f"the network does not take images at scale {scale:g} ({str(error).splitlines()[0]})")
    if classifier.backbone.img_size is not None:
        side = classifier.backbone.img_size
        notes.append(f"resolution: this network takes {side} px only, so smaller images are brought back to that")
    return replace(cell, params={**cell.params, "scales": scales}), notes


def _stability(condition: dict[str, Any], cosine: Tensor) -> Measurement:
    """The mean over images with Student's interval."""
    found = spread(cosine.double().numpy())
    return Measurement("stability", found.mean, found.n, found.low, found.high, condition)


def _about_the_head(classifier: Classifier) -> str:
    fitted = "fitted on full training images" if classifier.fitted else "as the checkpoint has it"
    return f"the classifier is {fitted}; only test images are cropped"


def _rising(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values))
