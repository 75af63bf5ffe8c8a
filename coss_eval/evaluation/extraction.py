"""Features into files for other tools, with what they are of and what they were made with beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.normalisation import normalisation_note
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.dataset import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.evaluation.facts import data_facts, model_facts
from coss_eval.evaluation.feature_files import FORMATS, FeatureFile, Ids, require, writing
from coss_eval.evaluation.planning import loaded_models
from coss_eval.evaluation.progress import Progress
from coss_eval.models.backbone import Site
from coss_eval.models.hooks import find_site
from coss_eval.models.model import Model
from coss_eval.probes.behaviour import refuse_batch_dependent
from coss_eval.probes.features import image_size
from coss_eval.probes.forward import outputs, ready, refuse_non_finite
from coss_eval.probes.sites import Locations, representations
from coss_eval.reports.files import write_file
from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.provenance import made_with
from coss_eval.similarity import dissimilarities
from coss_eval.similarity.geometry import MOST, Metric
from coss_eval.store import Store
from coss_eval.tasks.task import SplitName


@dataclass(frozen=True)
class _Work:
    """One network's part: which sites of it go to which folder, and how."""

    model: Model
    split: Split
    places: Sequence[Site]
    folder: Path
    kind: type[FeatureFile]
    locations: Locations
    metric: Metric | None
    facts: dict[str, Any]


def write_features(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
    out: str | Path,
    *,
    sites: Sequence[str] = ("global",),
    split: SplitName = "test",
    format: str = "npy",
    locations: Locations = "mean",
    dissimilarity: Metric | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the features of every image at ``sites``, all of a network in one pass, and what they are; the paths.

    ``out`` gets a folder a network, with a file a site (npy, safetensors or hdf5): float32 (N, D), the mean over
    locations, or (N, L, D) with ``locations`` "all". Beside them ids.npy and labels.npy (int64), images.csv (row, key,
    id, label, class) and, with a ``dissimilarity``, SITE-dissimilarity.npy, float32 (N, N), of 5,000 images at most;
    run.json in ``out`` says what made them. Rows are in the split's order without images that cannot be read. Memory
    does not grow with the number of images. Raises UsageError for what is not there, CossError for features that are
    not finite.

    >>> import tempfile, coss_eval as ce
    >>> paths = ce.write_features("pixels:8", "digits", tempfile.mkdtemp(), limit=20)
    >>> [path.name for path in paths]
    ['global.npy', 'ids.npy', 'labels.npy', 'images.csv', 'run.json']
    """
    kind = _checked(format, locations, dissimilarity, batch_size)
    loaded = loaded_models(models)
    at = [_places(model, sites) for model in loaded]
    dataset = dataset_of(data)
    dataset.refuse_changed()
    images = _images(dataset, split, limit, seed)
    if dissimilarity is not None and len(images) > MOST:
        raise UsageError(f"dissimilarities of {len(images):,} images are too many: give a limit of {MOST} at most")
    target, folder = resolve_device(device), Path(out)
    assumed = [model for model in loaded if model.preprocessing.said_by is None]
    for model in assumed:
        (on_note or (lambda line: None))(normalisation_note(model))
    entry = {
        **made_with(target),
        "seed": seed,
        "data": data_facts(replace(dataset, test=images) if split == "test" else dataset),
        "split": {"name": images.name, "n": len(images), "limit": images.limit, "fingerprint": images.fingerprint},
        "features": {"sites": list(sites), "locations": locations, "format": format},
        "models": [model_facts(model) for model in loaded],
    }
    for model in loaded:
        refuse_batch_dependent(model, image_size(model, images), target, min(batch_size, len(images)))
    paths: list[Path] = []
    for number, (model, places) in enumerate(zip(loaded, at, strict=True)):
        if on_progress is not None:
            on_progress(Progress(number, len(loaded), model.name))
        facts = {**{name: entry[name] for name in ("versions", "split", "features")}, "model": model.protocol()}
        own = folder / model.name.replace("/", "-")
        work = _Work(model, images, places, own, kind, locations, dissimilarity, facts)
        paths += _write(work, target, batch_size)
    if on_progress is not None:
        on_progress(Progress(len(loaded), len(loaded), "done"))
    left_out = images.left_out()
    Store(folder).record_run(entry | ({"left_out": [left_out]} if left_out else {}))
    return [*paths, folder / "run.json"]


def _checked(format: str, locations: Locations, dissimilarity: Metric | None, batch_size: int) -> type[FeatureFile]:
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if locations not in ("mean", "all"):
        raise unknown_name("choice of locations", locations, ("mean", "all"))
    if dissimilarity is not None and locations == "all":
        raise UsageError("dissimilarities are of the mean over locations: leave out --locations all")
    if batch_size < 1:
        raise UsageError(f"expected a batch size of 1 or more, got {batch_size}")
    require(FORMATS[format])
    return FORMATS[format]


def _places(model: Model, sites: Sequence[str]) -> list[Site]:
    if not sites:
        raise UsageError(f"no site to extract; {model.name} has {', '.join(model.backbone.sites)}")
    try:
        return [find_site(model.backbone, name) for name in dict.fromkeys(sites)]
    except UsageError as error:
        raise UsageError(f"{model.name}: {error}") from error


def _images(dataset: Dataset, name: SplitName, limit: int | None, seed: int) -> Split:
    """The split of that name, or so many of its images."""
    if name not in ("test", "train"):
        raise unknown_name("split", name, ("test", "train"))
    split = dataset.test if name == "test" else dataset.train
    if split is None:
        raise UsageError(f"{dataset.name} has no training split: its images are in the split test")
    return split if limit is None else split.limited(limit, seed)


def _write(work: _Work, device: torch.device, batch_size: int) -> list[Path]:
    """One network's files; each takes its place when all are whole."""
    network, split = work.model.encoder(), work.split
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {site.name: [] for site in work.places}
    with ExitStack() as stack:
        stack.enter_context(ready(network, device))
        found = stack.enter_context(representations(work.model.backbone, work.places, work.locations))
        files: dict[str, FeatureFile] = {}

        def compute(pixels: Tensor) -> dict[str, Tensor]:
            network(pixels)
            return dict(found)

        batches = split.batches(work.model.preprocessing.geometry, batch_size=batch_size)
        for batch, values in outputs(compute, batches, device):
            ids.append(batch.ids.cpu())
            labels.append(batch.labels.cpu())
            for site in work.places:
                rows = values[site.name].float().cpu()
                refuse_non_finite(rows, ids[-1], f"{work.model.name}: features at {site.name}")
                if site.name not in files:
                    path = work.folder / f"{site.name}{work.kind.suffix}"
                    file = writing(work.kind, path, len(split), rows.shape[1:], {**work.facts, "site": site.name})
                    files[site.name] = stack.enter_context(file)
                files[site.name].add(rows.numpy())
                if work.metric is not None:
                    kept[site.name].append(rows)
        if not files:
            raise CossError(f"no image of the {split.name} split could be read, so there are no features")
        read, of = torch.cat(ids).numpy(), torch.cat(labels).numpy()
        keys = _keys(split, read)
        for file_ in files.values():
            file_.end(read, of, keys)
    paths = [work.folder / f"{site.name}{work.kind.suffix}" for site in work.places]
    paths += [write_file(work.folder / f"{name}.npy", _npy(values)) for name, values in (("ids", read), ("labels", of))]
    paths.append(write_file(work.folder / "images.csv", _listed(keys, read, of, split.classes)))
    if work.metric is not None:
        for name, parts in kept.items():
            apart = dissimilarities(torch.cat(parts), metric=work.metric).float().numpy()
            paths.append(write_file(work.folder / f"{name}-dissimilarity.npy", _npy(apart)))
    return paths


def _keys(split: Split, read: Ids) -> list[str]:
    """The keys of the images that were read, in the split's order."""
    return split.subset(np.flatnonzero(np.isin(split.ids, read))).keys


def _npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _listed(keys: Sequence[str], ids: Ids, labels: Ids, classes: Sequence[str]) -> str:
    """images.csv: the rows of the features, and what each is of."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "key", "id", "label", "class"])
    for row, (key, name, label) in enumerate(zip(keys, ids.tolist(), labels.tolist(), strict=True)):
        writer.writerow([row, key, name, label, classes[label]])
    return buffer.getvalue()
