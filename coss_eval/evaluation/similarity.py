"""How alike networks and their layers are, on the same images: one pass over them for all networks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike
from coss_eval.checkpoints.load import normalisation_check
from coss_eval.checkpoints.normalisation import normalisation_note
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.batches import Batch
from coss_eval.data.choose import order_of
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.evaluation.facts import data_facts, model_facts
from coss_eval.evaluation.planning import loaded_models
from coss_eval.evaluation.run import Progress
from coss_eval.models.backbone import Site
from coss_eval.models.classifier import to_float
from coss_eval.models.hooks import find_site
from coss_eval.models.model import Model
from coss_eval.probes.behaviour import refuse_batch_dependent
from coss_eval.probes.features import image_size
from coss_eval.probes.forward import ahead, ready, refuse_non_finite
from coss_eval.probes.sites import Locations, representations
from coss_eval.reports.similarity import Place, Similarities, SimilarityValues
from coss_eval.runtime.device import exact_float32, resolve_device
from coss_eval.runtime.provenance import made_with
from coss_eval.similarity import StreamedCKA, procrustes_matrix, rsa_matrix
from coss_eval.similarity.arrays import Compared
from coss_eval.similarity.cka import FEWEST, gram
from coss_eval.similarity.geometry import MOST

MEASURES = ("cka", "rsa", "procrustes")
MINIBATCH = 256  # images at most


@dataclass(frozen=True)
class _Network:
    """A network, its sites, and the name of the stream of pixels that it shares with others of its geometry."""

    model: Model
    places: tuple[Site, ...]
    stream: str


@dataclass
class _Gathered:
    """What is kept of all images: grams by minibatch, and the first ``images`` images' representations."""

    images: int
    cka: StreamedCKA | None
    kept: dict[Place, list[Tensor]] = field(default_factory=dict)
    seen: int = 0

    def add(self, minibatch: dict[Place, Tensor]) -> None:
        count = len(next(iter(minibatch.values())))
        if self.cka is not None:
            self.cka.add_grams({" ".join(place): gram(values) for place, values in minibatch.items()})
        if (wanted := self.images - self.seen) > 0:
            for place, values in minibatch.items():
                self.kept.setdefault(place, []).append(values[:wanted].cpu())
        self.seen += count


def similarities(
    models: ModelLike | Sequence[ModelLike],
    data: DatasetLike,
    *,
    sites: Sequence[str] = (),
    measures: Sequence[str] = ("cka", "rsa"),
    locations: Locations = "mean",
    images: int = 1000,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Similarities:
    """Similarity between every site of every model on the test images, in one pass for all of them.

    ``sites`` are those of each model, all where none is named. ``measures``: cka (linear, debiased, of all images in
    minibatches formed by sample id), rsa and procrustes (of ``images`` fixed ones, 5,000 at most). A site with
    locations is their mean, or with ``locations`` "all" every location's units side by side, for cka alone. The order
    of the data and ``batch_size`` change nothing beyond rounding; memory does not grow with the number of images.
    ``limit`` takes a seeded class-balanced subset. Raises UsageError for names that are not there and for networks
    whose outputs depend on the batch, CossError where a site does not tell images apart.

    >>> import coss_eval as ce
    >>> found = ce.similarities("pixels:8", "digits", sites=["prepool", "global"], measures=["cka"], limit=64)
    >>> found.matrix("cka").shape
    (2, 2)
    """
    _check(measures, locations, images, batch_size)
    tell = on_note or (lambda line: None)
    loaded = loaded_models(models)
    dataset = dataset_of(data)
    dataset.refuse_changed()
    if limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(limit, seed))
    split, target = dataset.test, resolve_device(device)
    networks = [_network(model, split, sites) for model in loaded]
    if sum(len(network.places) for network in networks) < 2:
        raise UsageError("a similarity needs two representations: give two sites or two models")
    warnings = _warnings(networks, split)
    for line in warnings:
        tell(line)
    for network in networks:
        size = image_size(network.model, split)
        refuse_batch_dependent(network.model, size, target, min(batch_size, len(split)))
    gathered = _Gathered(0 if set(measures) == {"cka"} else images, StreamedCKA() if "cka" in measures else None)
    _pass(networks, split, gathered, locations, target, batch_size, on_progress)
    values = {name: _values(gathered, name, networks) for name in measures}
    entry = {
        **made_with(target),
        "seed": seed,
        "data": data_facts(dataset),
        "models": [model_facts(network.model) for network in networks],
        "warnings": [*warnings, *(f"Images were left out: {line}" for line in dataset.left_out())],
        "protocol": _protocol(split, locations, values),
    }
    return Similarities(_places(networks), values, entry)


def minibatch_size(images: int) -> int:
    """Of ``images`` in all: ten minibatches or more for the interval, of 16 images or more, evenly many in each."""
    most = min(MINIBATCH, max(16, images // 10))
    return math.ceil(images / math.ceil(images / most))


def _check(measures: Sequence[str], locations: Locations, images: int, batch_size: int) -> None:
    for name in measures:
        if name not in MEASURES:
            raise unknown_name("measure", name, MEASURES)
    if not measures:
        raise UsageError(f"no measure given; there are {', '.join(MEASURES)}")
    others = [name for name in measures if name != "cka"]
    if locations == "all" and others:
        raise UsageError(f"{others[0]} is of the mean over locations: with --locations all, give --measures cka alone")
    if not 3 <= images <= MOST:
        raise UsageError(f"rsa and procrustes take 3 to {MOST} images, got {images}")
    if batch_size < 1:
        raise UsageError(f"expected a batch size of 1 or more, got {batch_size}")


def _network(model: Model, split: Split, sites: Sequence[str]) -> _Network:
    names = list(dict.fromkeys(sites)) or list(model.backbone.sites)
    try:
        places = tuple(find_site(model.backbone, name) for name in names)
    except UsageError as error:
        raise UsageError(f"{model.name}: {error}") from error
    return _Network(model, places, str(split.protocol(model.preprocessing.geometry)))


def _places(networks: Sequence[_Network]) -> tuple[Place, ...]:
    return tuple(Place(network.model.name, site.name) for network in networks for site in network.places)


def _warnings(networks: Sequence[_Network], split: Split) -> list[str]:
    """Assumed normalisations, and those that do not fit the images."""
    found = []
    for model in (network.model for network in networks):
        if model.preprocessing.said_by is None:
            found.append(normalisation_note(model))
        few = split.subset(range(min(64, len(split))))
        for batch in few.batches(model.preprocessing.geometry, batch_size=64):
            if (warning := normalisation_check(model, batch.images)) is not None:
                found.append(f"{model.name}: {warning}")
    return found


def _pass(
    networks: Sequence[_Network],
    split: Split,
    gathered: _Gathered,
    locations: Locations,
    device: torch.device,
    batch_size: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Every network's representations of every minibatch, into ``gathered``."""
    total = math.ceil(len(split) / minibatch_size(len(split)))
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        watched = []
        for network in networks:
            encoder = network.model.encoder()
            stack.enter_context(ready(encoder, device))
            found = stack.enter_context(representations(network.model.backbone, network.places, locations))
            watched.append((network, encoder, found))
        for done, batches in enumerate(_minibatches(networks, split, device)):
            if on_progress is not None:
                on_progress(Progress(done, total, "minibatches"))
            minibatch: dict[Place, Tensor] = {}
            for network, encoder, found in watched:
                batch = batches[network.stream]
                parts = []
                for pixels in torch.split(batch.images, batch_size):  # type: ignore[no-untyped-call]
                    with torch.inference_mode():
                        encoder(to_float(pixels))
                    parts.append(dict(found))
                for site in network.places:
                    values = torch.cat([part[site.name] for part in parts])
                    what = f"{network.model.name}: representations at {site.name}"
                    refuse_non_finite(values.cpu(), batch.ids, what)
                    minibatch[Place(network.model.name, site.name)] = values
            gathered.add(minibatch)
    if on_progress is not None:
        on_progress(Progress(total, total, "done"))


def _minibatches(networks: Sequence[_Network], split: Split, device: torch.device) -> Iterator[dict[str, Batch]]:
    """The images in the order of their hashed ids, in pixels for each geometry, by the name of its stream.

    Minibatches by id, so that the order of the data changes nothing; and by its hash, so that neighbours on disk, often
    of one class, do not share one.
    """
    if len(split) < FEWEST:
        raise UsageError(f"a similarity needs {FEWEST} images or more, got {len(split)}; raise the limit")
    ordered = split.subset(np.argsort(order_of(split.ids, "similarity"), kind="stable"))
    size = minibatch_size(len(split))
    geometries = {network.stream: network.model.preprocessing.geometry for network in networks}
    streams = [ahead(ordered.batches(geometry, batch_size=size), device) for geometry in geometries.values()]
    for batches in zip(*streams, strict=True):
        if any(not torch.equal(batch.ids, batches[0].ids) for batch in batches):
            raise CossError("an image could be read at one size and not at another; mend or remove what is damaged")
        yield dict(zip(geometries, batches, strict=True))


def _values(gathered: _Gathered, measure: str, networks: Sequence[_Network]) -> SimilarityValues:
    places = _places(networks)
    names = [" ".join(place) for place in places]
    n = gathered.seen if measure == "cka" else min(gathered.seen, gathered.images)
    if measure == "cka":
        assert gathered.cka is not None
        found: Compared = gathered.cka.estimates()
    else:
        kept = [torch.cat(gathered.kept[place]) for place in places]
        found = (rsa_matrix if measure == "rsa" else procrustes_matrix)(kept, names=names)
    return SimilarityValues(found.value.numpy(), found.low.numpy(), found.high.numpy(), n)


def _protocol(split: Split, locations: Locations, values: dict[str, SimilarityValues]) -> str:
    """One sentence on how the numbers were made."""
    what = "the mean over its locations" if locations == "mean" else "all locations' units side by side"
    parts: list[Any] = [f"Protocol: a site is {what}"]
    if "cka" in values:
        parts.append(f"cka over minibatches of {minibatch_size(len(split))} images formed by hashed sample id")
    parts += [f"{name} on the first {found.n:,} of them" for name, found in values.items() if name != "cka"]
    return ", ".join(parts) + "."
