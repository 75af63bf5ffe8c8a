"""A page of heat maps: where images' locations agree with the rest of the image, in each of several networks."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.normalisation import normalisation_note
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.evaluation.facts import data_facts, model_facts
from coss_eval.evaluation.planning import loaded_models
from coss_eval.models.model import Model
from coss_eval.probes.forward import ahead, ready
from coss_eval.redundancy import heatmaps, location_means
from coss_eval.reports.drawing import save, style
from coss_eval.reports.files import write_file
from coss_eval.reports.saliency import HeatMaps, draw
from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.provenance import made_with
from coss_eval.store import Store


def write_heatmaps(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
    out: str | Path,
    *,
    site: str = "prepool",
    images: int = 6,
    limit: int = 1000,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write heatmaps.png and .pdf and each network's maps (NAME.npz: each, mean, ids); the paths.

    A map is each location's cosine with the mean of the other locations of its image; the mean of each place of the
    grid over ``limit`` test images is taken off first, and the page ends in the mean map over them. The ``images``
    shown, the first network's pixels of them, are among these. Raises UsageError where a site has no locations.
    """
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
    maps = {model.name: _maps(model, split, few, site, target, batch_size) for model in loaded}
    shown = next(few.batches(loaded[0].preprocessing.geometry, batch_size=images))
    with style():
        paths = save(draw(shown.images.permute(0, 2, 3, 1).numpy(), maps, len(split)), folder / "heatmaps")
    for name, found in maps.items():
        buffer = io.BytesIO()
        np.savez(buffer, each=found.each, mean=found.mean, ids=few.ids)
        paths.append(write_file(folder / f"{name.replace('/', '-')}.npz", buffer.getvalue()))
    entry = {
        **made_with(target),
        "seed": seed,
        "data": data_facts(dataset),
        "heatmaps": {"site": site, "images": images, "limit": len(split)},
        "models": [model_facts(model) for model in loaded],
    }
    Store(folder).record_run(entry)
    return [*paths, folder / "run.json"]


def _maps(model: Model, split: Split, few: Split, site: str, device: torch.device, batch_size: int) -> HeatMaps:
    geometry = model.preprocessing.geometry
    with ready(model.encoder(), device):
        centre = location_means(
            model, (b.images for b in ahead(split.batches(geometry, batch_size=batch_size), device)), site=site
        )
        total, count = torch.zeros(()), 0
        for batch in ahead(split.batches(geometry, batch_size=batch_size), device):
            found = heatmaps(model, batch.images, site=site, centre=centre)
            total, count = total + found.double().sum(0).cpu(), count + len(found)
        parts = [
            heatmaps(model, batch.images, site=site, centre=centre).cpu()
            for batch in ahead(few.batches(geometry, batch_size=batch_size), device)
        ]
    return HeatMaps(torch.cat(parts).numpy(), (total / count).float().numpy())
