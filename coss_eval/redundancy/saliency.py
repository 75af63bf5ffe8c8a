"""Where an image's locations agree with something: with the whole image, one place of it, another image, or a class."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Site, as_locations
from coss_eval.models.classifier import to_float
from coss_eval.models.hooks import device_of, find_site, outputs_of
from coss_eval.models.model import Model
from coss_eval.models.trial import evaluating


def heatmap(
    model: Model,
    image: Tensor | NDArray[np.uint8],
    *,
    of: str | tuple[int, int] | Tensor | NDArray[np.uint8] = "global",
    label: int | None = None,
    site: str = "prepool",
    centre: Tensor | None = None,
) -> Tensor:
    """Similarity of every location of ``image`` to something, float32 (H, W) on the grid of ``site``; needs no labels.

    ``image``: uint8, a tensor (3, H, W) or an array (H, W, 3). ``of`` "global": cosine with the mean of the OTHER
    locations, since the plain cosine with a mean holds the location itself; a (row, column) of the grid: cosine with
    that location; another image: with the mean of its locations. ``label``: instead, what each location adds to a
    class's logit, where the model has a linear head on the mean of its locations; the map's mean is the logit.
    ``centre`` (L, D), see ``location_means``, is taken off before cosines: without it ReLU makes all of them high.

    >>> import torch
    >>> from coss_eval.checkpoints.load import make_model
    >>> model = make_model("resnet18", stem="cifar", width=8)
    >>> heatmap(model, torch.randint(256, (3, 32, 32), dtype=torch.uint8)).shape
    torch.Size([4, 4])
    """
    local, grid = locations(model, as_images(image), site)
    if label is not None:
        return _evidence(model, as_images(image), local, label, site).reshape(grid)
    local = local[0] if centre is None else local[0] - _fitting(centre, local)
    if isinstance(of, str):
        if of != "global":
            raise UsageError(f"of must be 'global', a (row, column) or another image, got {of!r}")
        return _with_others(local[None])[0].reshape(grid)
    if isinstance(of, tuple):
        row, column = of
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise UsageError(f"the grid at {site!r} is {grid[0]} x {grid[1]}: there is no location {row}, {column}")
        return F.cosine_similarity(local, local[row * grid[1] + column][None], dim=1).reshape(grid)
    other = locations(model, as_images(of), site)[0][0]
    other = other if centre is None else other - _fitting(centre, other[None])
    return F.cosine_similarity(local, other.mean(0)[None], dim=1).reshape(grid)


def heatmaps(model: Model, images: Tensor, *, site: str = "prepool", centre: Tensor | None = None) -> Tensor:
    """``heatmap`` of "global" for uint8 images (B, 3, H, W): float32 (B, H, W)."""
    local, grid = locations(model, images, site)
    found = _with_others(local if centre is None else local - _fitting(centre, local))
    return found.reshape(len(found), *grid)


def location_means(model: Model, batches: Iterable[Tensor], *, site: str = "prepool") -> Tensor:
    """The mean (L, D) of each place of the grid over uint8 batches (B, 3, H, W): what ``heatmap`` takes off."""
    total, count = torch.zeros(()), 0
    for images in batches:
        local, _ = locations(model, images, site)
        total, count = total.to(local.device) + local.double().sum(0), count + len(local)
    if count == 0:
        raise UsageError("no image to take the mean of: the batches are empty")
    return (total / count).float()


def locations(model: Model, images: Tensor, site: str) -> tuple[Tensor, tuple[int, int]]:
    """Representations (B, L, D) of uint8 images (B, 3, H, W) at a site, and its grid. UsageError where it has none."""
    place = find_site(model.backbone, site)
    if place.layout == "nc":
        having = [one.name for one in model.backbone.sites.values() if one.layout != "nc"]
        raise UsageError(f"the site {site!r} has no locations; those that have are {', '.join(having)}")
    encoder = model.encoder().to(device_of(model.backbone))
    with evaluating(encoder), outputs_of(model.backbone, {place.module}) as outputs:
        encoder(to_float(images.to(device_of(model.backbone))))
        output = outputs[place.module].float()
    local = as_locations(output, place.layout, place.prefix_tokens)
    if local.shape[1] < 2:
        raise UsageError(f"at {site!r} these images have one location: there is nothing to compare")
    if not bool(local.isfinite().all()):
        raise CossError(
            f"{model.name}: representations at {site} hold NaN or infinity: check weights and normalisation"
        )
    return local, _grid(output, place, local.shape[1])


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


def _evidence(model: Model, images: Tensor, local: Tensor, label: int, site: str) -> Tensor:
    """The logit of ``label`` that the head gives to each location alone, (L,)."""
    head = model.head
    if not isinstance(head, nn.Linear) or site != "prepool":
        raise UsageError(f"{model.name}: evidence for a class needs a linear head of its own, and the site prepool")
    if not 0 <= label < head.out_features:
        raise UsageError(f"the head has {head.out_features} outputs, there is no {label}")
    with torch.no_grad():
        seen = model.encoder()(to_float(images.to(local.device)))
        mean = local.mean(1)
        if seen.shape != mean.shape or not torch.allclose(seen, mean, rtol=1e-3, atol=1e-4):
            raise UsageError(
                f"{model.name}: its global representation is not the mean of its locations: no evidence each"
            )
        return head.to(local.device)(local[0])[:, label]  # type: ignore[no-any-return]


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
