"""Features of a split at any site of a network, in one pass, cached on disk under all that they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike, as_model
from coss_eval.data.as_dataset import DatasetLike, split_of
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Site
from coss_eval.models.hooks import find_site
from coss_eval.models.model import Model
from coss_eval.probes import cache as disk
from coss_eval.probes.behaviour import keep, recall, refuse_batch_dependent
from coss_eval.probes.forward import finite_rows, outputs, ready, refuse_non_finite
from coss_eval.probes.sites import representations
from coss_eval.runtime.code_identity import UNKNOWN
from coss_eval.runtime.device import Compute, resolve_device
from coss_eval.runtime.live import image_line

VERSION = 1  # to be raised when the same protocol comes to mean other features


@dataclass(frozen=True)
class Features:
    """One vector per image and site, in the split's order; images that could not be read are left out."""

    ids: Tensor  # int64 (N,)
    labels: Tensor  # int64 (N,)
    values: Mapping[str, Tensor]  # by site, float32 (N, D)
    cached: bool = False  # whether they were read from the disk

    def __len__(self) -> int:
        return len(self.ids)

    def among(self, split: Split) -> Features:
        """Those of the images of ``split``, a part of the split they were extracted from."""
        rows = torch.from_numpy(np.isin(self.ids.numpy(), split.ids))
        values = {site: value[rows] for site, value in self.values.items()}
        return Features(self.ids[rows], self.labels[rows], values, self.cached)


def extract(
    model: ModelLike,
    split: Split | DatasetLike,
    *,
    sites: Sequence[str] = ("global",),
    batch_size: int = 256,
    device: str | torch.device = "auto",
    cache: bool = True,
    quiet: bool = False,
) -> Features:
    """Features of every image of ``split`` at ``sites``, on the CPU; a site with locations gives their mean.

    ``model`` is what ``as_model`` takes, ``split`` a Split, images without labels (theirs are -1), or what
    ``as_dataset`` takes, whose test split it is. A Model's backbone is moved to the device; its modes, gradients and
    hooks are left as they were. With ``cache``, features of the same weights, code, images, geometry and sites are read
    from the user's cache directory or kept there. What takes some seconds says how far it is, unless ``quiet``.
    UsageError where an image's features depend on its batch, CossError where one is not finite.

    >>> import coss_eval as ce
    >>> features = ce.extract(ce.load_model("pixels:8"), ce.load_dataset("digits").test, cache=False)
    >>> features.values["global"].shape, len(features.ids)
    (torch.Size([451, 192]), 451)
    """
    split = split_of(split)
    split.refuse_changed()
    with image_line(quiet=quiet) as on_images:
        compute = Compute(resolve_device(device), batch_size, cache, on_images)
        return extract_known(as_model(model).identified(), split, compute, sites=sites, check_batches=True)


def extract_known(
    model: Model,
    split: Split,
    compute: Compute,
    *,
    sites: Sequence[str] = ("global",),
    check_batches: bool = False,
) -> Features:
    """``extract`` of a model whose identity was taken just now, as within one evaluation: nothing is hashed again."""
    if model.batch_size is not None:
        model = replace(model, batch_size=compute.batch_size)
    if not sites:
        raise UsageError(f"no site to extract; this network has {', '.join(model.backbone.sites)}")
    places = [find_site(model.backbone, name) for name in sites]
    if (kept := kept_features(model, split, compute, sites)) is not None:
        return kept
    if check_batches:
        refuse_batch_dependent(model, image_size(model, split), compute.device, min(compute.batch_size, len(split)))
    features = _extract(model, split, places, compute)
    return keep_features(features, model, split, compute)


def kept_features(model: Model, split: Split, compute: Compute, sites: Sequence[str] = ("global",)) -> Features | None:
    """What is kept of ``extract_known`` with the same arguments; None where nothing, or it is not to be read."""
    if not _cached(model, compute):
        return None
    name, entries = disk.key("features", protocol(model, split, sites)), ["ids", "labels", *map(_entry, sites)]
    found = recall(name, entries, model, image_size(model, split), compute.device, compute.held.get(name))
    if found is None:
        return None
    split.mark_left_out(found["ids"])
    known = _of_arrays(found, sites, cached=True)
    whole = all(finite_rows(values).all() for values in known.values.values())  # earlier versions kept NaN, too
    return known if whole else None


def keep_features(features: Features, model: Model, split: Split, compute: Compute) -> Features:
    """Keep the features of a whole split: in the cache, or for this run where it has no room; the same, from there."""
    if not _cached(model, compute):
        return features
    sites = tuple(features.values)
    name = disk.key("features", protocol(model, split, sites))
    values = {_entry(site): value.numpy() for site, value in features.values.items()}
    arrays = {"ids": features.ids.numpy(), "labels": features.labels.numpy(), **values}
    whole = keep(name, arrays, model, image_size(model, split), compute.device)
    mapped = disk.on_disk(name, whole)  # so that memory holds them while they are made alone
    compute.held.clear()
    if not disk.holds(name):
        compute.held[name] = mapped
    return _of_arrays(mapped, sites)


def _of_arrays(found: Mapping[str, NDArray[Any]], sites: Sequence[str], *, cached: bool = False) -> Features:
    tensors = {entry: torch.from_numpy(array) for entry, array in found.items()}
    values = {site: tensors[_entry(site)] for site in sites}
    return Features(tensors["ids"], tensors["labels"], values, cached)


def _cached(model: Model, compute: Compute) -> bool:
    """Whether the cache is used: what cannot be identified is not cached."""
    return compute.cache and model.code != UNKNOWN


def protocol(model: Model, split: Split, sites: Sequence[str] = ("global",)) -> dict[str, Any]:
    """All that features depend on, as JSON."""
    return {
        "model": model.protocol(),
        "data": split.fingerprint,
        "geometry": split.protocol(model.preprocessing.geometry),
        "sites": sorted(set(sites)),
        "version": VERSION,
    }


def image_size(model: Model, split: Split) -> tuple[int, int]:
    """(height, width) of the pixels that a network is given of a split, before it resizes them itself."""
    size = split.protocol(model.preprocessing.geometry)["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _entry(site: str) -> str:
    return f"at {site}"


def _extract(model: Model, split: Split, places: Sequence[Site], how: Compute) -> Features:
    batches, device = split.batches(model.preprocessing.geometry, batch_size=how.batch_size), how.device
    network = model.encoder()
    ids, labels = (torch.empty(len(split), dtype=torch.int64) for _ in range(2))
    values: dict[str, Tensor] = {}
    seen = 0
    with ready(network, device), representations(model.backbone, places) as averages:

        def compute(pixels: Tensor) -> dict[str, Tensor]:
            network(pixels)
            return dict(averages)

        for batch, found in outputs(compute, batches, device):
            if not values:
                values = {site: torch.empty(len(split), average.shape[1]) for site, average in found.items()}
            rows = slice(seen, seen + len(batch.ids))
            ids[rows], labels[rows] = batch.ids, batch.labels
            for site, average in found.items():
                values[site][rows] = average
            seen += len(batch.ids)
            if how.on_images is not None:
                how.on_images(f"features of {model.name}", seen, len(split))
    if not seen:
        raise CossError(f"no image of the {split.name} split could be read, so there are no features")
    for site, value in values.items():
        refuse_non_finite(value[:seen], ids[:seen], f"{model.name}: features at {site}")
    return Features(ids[:seen], labels[:seen], {site: value[:seen] for site, value in values.items()})
