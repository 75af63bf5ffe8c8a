"""What a measure inside networks is given: a backbone with normalised pixels, or anything a person has in hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike, as_model
from coss_eval.data.as_dataset import DatasetLike, split_of
from coss_eval.data.pixels import is_array
from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.hooks import device_of
from coss_eval.models.model import Model

PixelBatches = Iterable[Tensor] | Callable[[], Iterable[Tensor]]

BATCH = 256  # images of a split that go through at once


def backbone_of(network: Backbone | Classifier | ModelLike) -> Backbone:
    """The backbone of whatever ``as_model`` takes; a Backbone, and that of a Classifier, as it is."""
    return network if isinstance(network, Backbone) else _with_backbone(network).backbone


def measured(
    network: Backbone | Classifier | ModelLike, images: PixelBatches | DatasetLike
) -> tuple[Backbone, PixelBatches]:
    """A backbone, and batches of normalised pixels for it, which may be read several times where ``images`` may.

    A Backbone's batches are normalised pixels already and are handed on. For all others ``images`` are batches of
    pixels (B, 3, H, W), uint8 or in [0, 1], or what ``split_of`` takes; they are normalised as the model says.
    """
    if isinstance(network, Backbone):
        return network, images
    model = _with_backbone(network)
    classifier = model if isinstance(model, Classifier) else model.encoder().to(device_of(model.backbone))
    batches = _batches(model, images)
    if isinstance(batches, Iterator):  # once only
        return model.backbone, (_normalised(classifier, batch) for batch in batches)
    return model.backbone, lambda: (_normalised(classifier, batch) for batch in _started(batches))


def _with_backbone(network: Classifier | ModelLike) -> Classifier | Model:
    return network if isinstance(network, Classifier) else as_model(network)


def _batches(model: Classifier | Model, images: PixelBatches | DatasetLike) -> PixelBatches:
    """Batches as they are; those of a split, with their labels left out."""
    if callable(images) or isinstance(images, Iterator) or _is_list_of_batches(images):
        return images  # type: ignore[no-any-return]
    split = split_of(images)
    return lambda: (batch.images for batch in split.batches(model.preprocessing.geometry, batch_size=BATCH))


def _is_list_of_batches(images: Any) -> bool:
    return isinstance(images, Sequence) and len(images) > 0 and all(is_array(one) and one.ndim == 4 for one in images)


def _started(batches: PixelBatches) -> Iterable[Tensor]:
    return batches() if callable(batches) else batches


def _normalised(classifier: Classifier, batch: Any) -> Tensor:
    """Pixels, uint8 or in [0, 1], as the backbone takes them; UsageError for others."""
    pixels = torch.as_tensor(batch)
    if pixels.dtype == torch.uint8:
        pixels = to_float(pixels)
    low, high = pixels.min().item(), pixels.max().item()
    if not (pixels.is_floating_point() and low >= -1e-6 and high <= 1 + 1e-6):
        raise UsageError(
            f"batches for a model are uint8 or floats in [0, 1], got {pixels.dtype} from {low:.3g} to {high:.3g}: it "
            "normalises by itself (a Backbone takes normalised pixels as they are)"
        )
    return classifier.normalise(pixels.float().to(classifier.mean.device))
