"""How alike networks and their layers are, on the same images: one pass over them for all networks at once."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from coss_eval.evaluation.progress import Progress
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
from coss_eval.similarity import Recordings, StreamedCKA, cka, noise_ceiling, procrustes_matrix, rsa, rsa_matrix
from coss_eval.similarity.arrays import Compared
from coss_eval.similarity.cka import FEWEST, gram
from coss_eval.similarity.geometry import MOST

MEASURES = ("cka", "rsa", "procrustes")
MINIBATCH = 256  # images at most
RECORDED = "recordings"  # the site that tables give recordings


@dataclass(frozen=True)
class _Network:
    """A network, its sites, and the name of the stream of pixels that it shares with others of its geometry."""

    model: Model
    places: tuple[Site, ...]
    stream: str


@dataclass(frozen=True)
class _Recorded:
    """Recordings, and the row in them of each image by its sample id."""

    given: Recordings
    values: Tensor
    row: dict[int, int]

    @property
    def place(self) -> Place:
        return Place(self.given.name, RECORDED)

    def of(self, ids: Tensor) -> Tensor:
        """What was recorded of these images, in their order."""
        return self.values[[self.row[i] for i in ids.tolist()]]

    def side_by_side(self, ids: Tensor, locations: Locations) -> Tensor:
        """The same as a network's representations are: a mean over repeats, and over locations where those are."""
        values = self.of(ids).float()
        averaged = values.ndim == 3 and (self.given.repeats or locations == "mean")
        return values.mean(1) if averaged else values

    def facts(self) -> dict[str, Any]:
        content = hashlib.sha256(np.ascontiguousarray(self.values.numpy()).tobytes()).hexdigest()
        return {
            "name": self.given.name,
            "shape": [*self.values.shape],
            "repeats": self.given.repeats,
            "sha256": content,
        }


@dataclass
class _Gathered:
    """What is kept of all images: grams by minibatch, and the first ``images`` images' representations."""

    images: int
    cka: StreamedCKA | None
    kept: dict[Place, list[Tensor]] = field(default_factory=dict)
    ids: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def add(self, ids: Tensor, minibatch: dict[Place, Tensor]) -> None:
        count = len(ids)
        self.ids.append(ids.cpu())
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
    recordings: Recordings | Sequence[Recordings] = (),
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
    ``limit`` takes a seeded class-balanced subset. ``recordings`` stand beside the networks, on the test images that
    all of them have; those with repeats get a noise ceiling, in cka and rsa.

    Raises UsageError for names and recorded images that are not there and for networks whose outputs depend on the
    batch, CossError where a site does not tell images apart.

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
    recorded = _recorded(recordings, dataset.test, loaded)
    if recorded:
        dataset = replace(dataset, test=_with_all(recorded, dataset.test))
    if limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(limit, seed))
    split, target = dataset.test, resolve_device(device)
    networks = [_network(model, split, sites) for model in loaded]
    places = _places(networks, recorded)
    if len(places) < 2:
        raise UsageError("a similarity needs two representations: give two sites or two models, or recordings")
    warnings = _warnings(networks, split)
    for line in warnings:
        tell(line)
    for network in networks:
        size = image_size(network.model, split)
        refuse_batch_dependent(network.model, size, target, min(batch_size, len(split)))
    gathered = _Gathered(0 if set(measures) == {"cka"} else images, StreamedCKA() if "cka" in measures else None)
    _pass(networks, recorded, split, gathered, locations, target, batch_size, on_progress)
    values = {name: _values(gathered, name, places, recorded) for name in measures}
    entry = {
        **made_with(target),
        "seed": seed,
        "data": data_facts(dataset),
        "models": [model_facts(network.model) for network in networks],
        **({"recordings": [one.facts() for one in recorded]} if recorded else {}),
        "warnings": [*warnings, *(f"Images were left out: {line}" for line in dataset.left_out())],
        "protocol": _protocol(split, locations, values),
    }
    return Similarities(places, values, entry)


def read_recordings(text: str) -> Recordings:
    """Recordings in a file, from "NAME=FILE.npz" as the command line has it. Raises UsageError in one line.

    The file holds ids (a dataset's sample ids, or its keys) and either units (images, units), locations (images,
    locations, units) or repeats (images, repeats, units).
    """
    name, _, file = text.partition("=")
    if not name.strip() or not file.strip():
        raise UsageError(f"expected --recordings NAME=FILE.npz, got {text!r}")
    try:
        with np.load(Path(file.strip()).expanduser()) as archive:  # pickles are refused
            arrays = {key: archive[key] for key in ("ids", "units", "locations", "repeats") if key in archive}
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {file.strip()} of recordings") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UsageError(f"{file.strip()} is no .npz of plain arrays; save it with numpy.savez") from error
    given = [key for key in arrays if key != "ids"]
    if "ids" not in arrays or len(given) != 1:
        raise UsageError(
            f"{file.strip()} needs ids and one of units, locations and repeats; it has {', '.join(arrays) or 'neither'}"
        )
    values = arrays[given[0]]
    if values.ndim != (2 if given[0] == "units" else 3) or values.dtype.kind not in "biuf":
        raise UsageError(f"{file.strip()}: {given[0]} has the shape {values.shape} of {values.dtype}")
    return Recordings(name.strip(), values, arrays["ids"], repeats=given[0] == "repeats")


def _recorded(
    recordings: Recordings | Sequence[Recordings], split: Split, models: Sequence[Model]
) -> tuple[_Recorded, ...]:
    """The recordings by the sample ids of ``split``. Raises UsageError for images that it has not."""
    given = (recordings,) if isinstance(recordings, Recordings) else tuple(recordings)
    names = [model.name for model in models] + [one.name for one in given]
    if twice := [name for name in names if names.count(name) > 1 and name in [one.name for one in given]]:
        raise UsageError(f"{twice[0]} is the name of two things that are compared; give the recordings another")
    by_key = dict(zip(split.keys, split.ids.tolist(), strict=True)) if given else {}
    known, found = set(by_key.values()), []
    for one in given:
        labels = np.asarray(one.ids)
        ids = [by_key.get(str(key)) for key in labels] if labels.dtype.kind == "U" else [int(label) for label in labels]
        lacking = [label for label, i in zip(labels.tolist(), ids, strict=True) if i not in known]
        if lacking:
            raise UsageError(
                f"the recordings {one.name} are of {len(lacking)} images that are not among the {len(split):,} test "
                f"images, such as {lacking[0]!r}; ids are those of data.test.ids, or keys such as {split.key(0)!r}"
            )
        rows = {i: row for row, i in enumerate(ids) if i is not None}
        found.append(_Recorded(one, torch.as_tensor(one.values).detach().cpu(), rows))
    return tuple(found)


def _with_all(recorded: Sequence[_Recorded], split: Split) -> Split:
    """The images that all recordings have. Raises UsageError where there is none."""
    shared = set.intersection(*(set(one.row) for one in recorded))
    if not shared:
        raise UsageError(f"{' and '.join(one.given.name for one in recorded)} have no image in common")
    return split.subset(np.flatnonzero(np.isin(split.ids, list(shared))))


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


def _places(networks: Sequence[_Network], recorded: Sequence[_Recorded]) -> tuple[Place, ...]:
    of_networks = [Place(network.model.name, site.name) for network in networks for site in network.places]
    return (*of_networks, *(one.place for one in recorded))


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
    recorded: Sequence[_Recorded],
    split: Split,
    gathered: _Gathered,
    locations: Locations,
    device: torch.device,
    batch_size: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Every network's representations of every minibatch, and what was recorded of it, into ``gathered``."""
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
            ids = next(iter(batches.values())).ids
            minibatch |= {one.place: one.side_by_side(ids, locations).to(device) for one in recorded}
            gathered.add(ids, minibatch)
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


def _values(
    gathered: _Gathered, measure: str, places: Sequence[Place], recorded: Sequence[_Recorded]
) -> SimilarityValues:
    names = [" ".join(place) for place in places]
    n = gathered.seen if measure == "cka" else min(gathered.seen, gathered.images)
    if measure == "cka":
        assert gathered.cka is not None
        found: Compared = gathered.cka.estimates()
    else:
        for place in places:  # one by one, so that what is kept is never held twice
            gathered.kept[place] = [torch.cat(gathered.kept[place])]
        kept = [gathered.kept[place][0] for place in places]
        found = (rsa_matrix if measure == "rsa" else procrustes_matrix)(kept, names=names)
    ids = torch.cat(gathered.ids)[: min(n, MOST)]
    ceilings = {one.place: _ceiling(one, measure, ids) for one in recorded}
    own = np.array([ceilings.get(place, 1.0) for place in places])
    return SimilarityValues(found.value.numpy(), found.low.numpy(), found.high.numpy(), n, own)


def _ceiling(one: _Recorded, measure: str, ids: Tensor) -> float:
    """What the noise of recordings leaves to reach; NaN where they have no repeats, and for Procrustes."""
    if not one.given.repeats or measure == "procrustes":
        return math.nan
    try:
        return noise_ceiling(one.of(ids), measure=cka if measure == "cka" else rsa).ceiling
    except CossError as error:
        raise CossError(f"{one.given.name}: {error}") from error


def _protocol(split: Split, locations: Locations, values: dict[str, SimilarityValues]) -> str:
    """One sentence on how the numbers were made."""
    what = "the mean over its locations" if locations == "mean" else "all locations' units side by side"
    parts: list[Any] = [f"Protocol: a site is {what}"]
    if "cka" in values:
        parts.append(f"cka over minibatches of {minibatch_size(len(split))} images formed by hashed sample id")
    parts += [f"{name} on the first {found.n:,} of them" for name, found in values.items() if name != "cka"]
    return ", ".join(parts) + "."
