"""Where an image's locations agree with something: with the whole image, one place of it, another image, or a class."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Site, as_locations
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.hooks import device_of, find_site, outputs_of
from coss_eval.models.model import Model
from coss_eval.models.trial import evaluating

ModelOrClassifier = Model | Classifier
ComparedWith = str | tuple[int, int] | Tensor | NDArray[np.uint8]


def heatmap(
    model: ModelOrClassifier,
    image: Tensor | NDArray[np.uint8],
    *,
    of: ComparedWith = "global",
    label: int | None = None,
    site: str = "prepool",
    centre: Tensor | None = None,
) -> Tensor:
    """``heatmaps`` of one image: float32 (H, W) on the grid of ``site``.

    ``image``, and ``of`` where it is one: uint8, a tensor (3, H, W) or an array (H, W, 3).

    >>> import torch
    >>> from coss_eval.checkpoints.load import make_model
    >>> model = make_model("resnet18", stem="cifar", width=8)
    >>> heatmap(model, torch.randint(256, (3, 32, 32), dtype=torch.uint8)).shape
    torch.Size([4, 4])
    """
    target = of if isinstance(of, str | tuple) else as_images(of)
    labels = None if label is None else torch.tensor([label])
    return heatmaps(model, as_images(image), of=target, labels=labels, site=site, centre=centre)[0]


def heatmaps(
    model: ModelOrClassifier,
    images: Tensor,
    *,
    of: str | tuple[int, int] | Tensor = "global",
    labels: Tensor | None = None,
    site: str = "prepool",
    centre: Tensor | None = None,
) -> Tensor:
    """Similarity of every location of images (B, 3, H, W), uint8, to something: float32 (B, H', W'); needs no labels.

    ``of`` "global": cosine with the mean of the OTHER locations, since the plain cosine with a mean holds the location
    itself; a (row, column) of the grid: cosine with that location; other images, one for each or one for all: cosine
    with the mean of their locations. ``labels`` (B,): instead, what each location alone gives to a class's logit, of a
    Model with a linear head of its own or of what ``fit_classifier`` returns, where the logits are those of the mean of
    the locations; the map's mean is the logit. ``centre`` (L, D), see ``location_means``, is taken off before cosines:
    without it ReLU makes all of them high.
    """
    if labels is not None:
        return _evidence(model, images, labels, site)
    local, grid = locations(model, images, site)
    local = local if centre is None else local - _fitting(centre, local)
    if isinstance(of, str):
        if of != "global":
            raise UsageError(f"of must be 'global', a (row, column) or another image, got {of!r}")
        return _with_others(local).reshape(len(local), *grid)
    if isinstance(of, tuple):
        row, column = of
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise UsageError(f"the grid at {site!r} is {grid[0]} x {grid[1]}: there is no location {row}, {column}")
        target = local[:, row * grid[1] + column]
    else:
        if len(of) not in (1, len(images)):
            raise UsageError(f"give one other image for all, or one for each of {len(images)}, got {len(of)}")
        other, _ = locations(model, of, site)
        target = (other if centre is None else other - _fitting(centre, other)).mean(1)
    return F.cosine_similarity(local, target[:, None], dim=2).reshape(len(local), *grid)


def location_means(model: ModelOrClassifier, batches: Iterable[Tensor], *, site: str = "prepool") -> Tensor:
    """The mean (L, D) of each place of the grid over uint8 batches (B, 3, H, W): what ``heatmaps`` takes off."""
    total, count = torch.zeros(()), 0
    for images in batches:
        local, _ = locations(model, images, site)
        total, count = total.to(local.device) + local.double().sum(0), count + len(local)
    if count == 0:
        raise UsageError("no image to take the mean of: the batches are empty")
    return (total / count).float()


def locations(model: ModelOrClassifier, images: Tensor, site: str) -> tuple[Tensor, tuple[int, int]]:
    """Representations (B, L, D) of uint8 images (B, 3, H, W) at a site, and its grid. UsageError where it has none."""
    local, _, grid = _seen(model, images, site)
    return local, grid


def _seen(model: ModelOrClassifier, images: Tensor, site: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """As ``locations``, with the global representation (B, D') of the same pass between them."""
    place = find_site(model.backbone, site)
    if place.layout == "nc":
        having = [one.name for one in model.backbone.sites.values() if one.layout != "nc"]
        raise UsageError(f"the site {site!r} has no locations; those that have are {', '.join(having)}")
    device = device_of(model.backbone)
    encoder = model if isinstance(model, Classifier) else model.encoder().to(device)
    with torch.no_grad(), evaluating(encoder), outputs_of(model.backbone, {place.module}) as outputs:
        global_ = model.backbone(encoder.normalise(to_float(images.to(device)))).float()
        output = outputs[place.module].float()
    local = as_locations(output, place.layout, place.prefix_tokens)
    if local.shape[1] < 2:
        raise UsageError(f"at {site!r} these images have one location: there is nothing to compare")
    if not bool(local.isfinite().all()):
        raise CossError(
            f"{_name(model)}: representations at {site} hold NaN or infinity: check weights and normalisation"
        )
    return local, global_, _grid(output, place, local.shape[1])


def _name(model: ModelOrClassifier) -> str:
    return model.name if isinstance(model, Model) else "the classifier"


def as_images(image: Tensor | NDArray[np.uint8]) -> Tensor:
    """One image as uint8 (1, 3, H, W)."""
    array = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image).copy())
    if array.ndim == 3 and array.shape[0] != 3 and array.shape[2] == 3:
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != torch.uint8:
        raise UsageError(f"expected a uint8 image (3, H, W) or (H, W, 3), got {array.dtype} {tuple(array.shape)}")
    return array[None]


def _with_others(local: Tensor) -> Tensor:
    """Cosine (B, L) of each location of (B, L, D) with the mean of its image's others."""
    others = (local.sum(1, keepdim=True) - local) / (local.shape[1] - 1)
    return F.cosine_similarity(local, others, dim=2)


def _evidence(model: ModelOrClassifier, images: Tensor, labels: Tensor, site: str) -> Tensor:
    """The logit of each image's label that the head gives to each location alone, (B, H, W)."""
    logits: Callable[[Tensor], Tensor] | None = model.logits if isinstance(model, Classifier) else _head(model)
    if logits is None or site != "prepool":
        raise UsageError(f"{_name(model)}: evidence for a class needs a linear head, and the site prepool")
    local, global_, grid = _seen(model, images, site)
    refusal = f"{_name(model)}: its logits are not those of the mean of its locations, so that none has evidence"
    if local.shape[2] != global_.shape[1]:
        raise UsageError(refusal)
    with torch.no_grad():
        whole = logits(global_)  # (B, K)
        each = logits(local.flatten(0, 1)).reshape(*local.shape[:2], -1)  # (B, L, K)
    if bad := [label for label in labels.tolist() if not 0 <= label < whole.shape[1]]:
        raise UsageError(f"the head has {whole.shape[1]} outputs, there is no {bad[0]}")
    if not torch.allclose(whole, each.mean(1), rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise UsageError(refusal)
    picked: Tensor = each.gather(2, labels.to(each.device)[:, None, None].expand(-1, each.shape[1], 1))
    return picked.reshape(len(each), *grid)


def _head(model: Model) -> nn.Module | None:
    """The model's own, where its backbone is."""
    return None if model.head is None else model.head.to(device_of(model.backbone))


def _fitting(centre: Tensor, local: Tensor) -> Tensor:
    if centre.shape != local.shape[1:]:
        raise UsageError(f"the centre is {tuple(centre.shape)}, the image's locations are {tuple(local.shape[1:])}")
    return centre.to(local.device)


def _grid(output: Tensor, site: Site, count: int) -> tuple[int, int]:
    if site.layout == "nchw":
        return (output.shape[2], output.shape[3])
    if site.layout == "nhwc":
        return (output.shape[1], output.shape[2])
    side = round(count**0.5)
    if side * side != count:
        raise UsageError(f"the {count} tokens at {site.name!r} are no square grid")
    return side, side
