"""A page of heat maps: where images' locations agree with the rest of the image, in each of several networks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.normalisation import normalisation_note
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.batches import Batch
from coss_eval.data.split import Split
from coss_eval.errors import UsageError, unknown_name
from coss_eval.evaluation.facts import data_facts, model_facts
from coss_eval.evaluation.planning import loaded_models
from coss_eval.models.classifier import Classifier
from coss_eval.models.model import Model
from coss_eval.probes import fit_classifier
from coss_eval.probes.forward import ahead, ready
from coss_eval.redundancy import heatmaps, location_means
from coss_eval.reports.drawing import save, style
from coss_eval.reports.files import write_file
from coss_eval.reports.saliency import HeatMaps, draw
from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.provenance import made_with
from coss_eval.store import Store

Shown = Literal["global", "another", "evidence"]
SHOWN: dict[str, str] = {
    "global": "cosine with the other locations",
    "another": "cosine with another image",
    "evidence": "what a location alone gives to the logit of the image's class",
}


def write_heatmaps(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
    out: str | Path,
    *,
    of: Shown | tuple[int, int] = "global",
    site: str = "prepool",
    images: int = 6,
    limit: int = 1000,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write heatmaps.png and .pdf and each network's maps (NAME.npz: each, mean, ids); the paths.

    ``of``: a map is each location's cosine with the mean of the other locations of its image ("global"), with one
    location of it (row, column), or with the mean of another image's locations, the next among those looked at
    ("another"); the mean of each place of the grid over ``limit`` test images is taken off first. Or it is what each
    location alone gives to the logit of the image's class ("evidence"), by the network's own head where its class names
    match, else by a linear probe. The page ends in the mean map over all ``limit`` images. The ``images`` shown, the
    first network's pixels of them, are among these. Raises UsageError where a site has no locations, and for evidence
    of networks whose logits are not those of the mean of the locations.
    """
    if isinstance(of, str) and of not in SHOWN:
        raise unknown_name("kind of heat map", of, [*SHOWN, "ROW,COLUMN"])
    if not 1 <= images <= limit:
        raise UsageError(f"expected 1 to {limit} images to show, got {images}")
    loaded = loaded_models(models)
    dataset = dataset_of(data)
    dataset.refuse_changed()
    split, few = dataset.test.limited(limit, seed), dataset.test.limited(images, seed)
    target, folder = resolve_device(device), Path(out)
    for model in loaded:
        if on_note is not None and model.preprocessing.said_by is None:
            on_note(normalisation_note(model))
    labels = of == "evidence"
    work = [fit_classifier(model, dataset, device=target) if labels else model for model in loaded]
    maps = {
        model.name: _maps(network, split, few, of, site, target, batch_size)
        for model, network in zip(loaded, work, strict=True)
    }
    geometry = loaded[0].preprocessing.geometry
    pixels = [next(one.batches(geometry, batch_size=images)).images.permute(0, 2, 3, 1).numpy()
              for one in (few, _next(few, split))]  # fmt: skip
    figure = draw(
        pixels[0],
        maps,
        len(split),
        label=f"cosine with location {of[0]}, {of[1]}" if isinstance(of, tuple) else SHOWN[of],
        others=pixels[1] if of == "another" else None,
        chosen=of if isinstance(of, tuple) else None,
        evidence=labels,
    )
    with style():
        paths = save(figure, folder / "heatmaps")
    for name, found in maps.items():
        buffer = io.BytesIO()
        np.savez(buffer, each=found.each, mean=found.mean, ids=few.ids)
        paths.append(write_file(folder / f"{name.replace('/', '-')}.npz", buffer.getvalue()))
    entry = {
        **made_with(target),
        "seed": seed,
        "data": data_facts(dataset),
        "heatmaps": {"of": of, "site": site, "images": images, "limit": len(split)},
        "models": [model_facts(model) for model in loaded],
    }
    Store(folder).record_run(entry)
    return [*paths, folder / "run.json"]


def _next(of: Split, among: Split) -> Split:
    """For each image of a split, the one that comes after it in another that holds it; the first after the last."""
    places = {int(one): place for place, one in enumerate(among.ids)}
    return among.subset([(places[int(one)] + 1) % len(among) for one in of.ids])


def _maps(
    network: Model | Classifier,
    split: Split,
    few: Split,
    of: Shown | tuple[int, int],
    site: str,
    device: torch.device,
    batch_size: int,
) -> HeatMaps:
    geometry = network.preprocessing.geometry

    def batches(images: Split) -> Iterator[Batch]:
        return ahead(images.batches(geometry, batch_size=batch_size), device)

    def found(images: Split) -> Iterator[Tensor]:
        if of == "another":
            for batch, other in zip(batches(images), batches(_next(images, split)), strict=True):
                yield heatmaps(network, batch.images, of=other.images, site=site, centre=centre)
            return
        for batch in batches(images):
            target: Any = "global" if of == "evidence" else of
            labels = batch.labels if of == "evidence" else None
            yield heatmaps(network, batch.images, of=target, labels=labels, site=site, centre=centre)

    with ready(network if isinstance(network, Classifier) else network.encoder(), device):
        centre = None if of == "evidence" else location_means(network, (b.images for b in batches(split)), site=site)
        total, count = torch.zeros(()), 0
        for part in found(split):
            total, count = total + part.double().sum(0).cpu(), count + len(part)
        each = torch.cat([part.cpu() for part in found(few)])
    return HeatMaps(each.numpy(), (total / count).float().numpy())
