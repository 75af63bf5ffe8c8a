"""How alike the local representations of an image are, beside what an untrained network of the same kind shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from coss_eval.data.choose import order_of
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.probes.behaviour import fixed_images
from coss_eval.probes.fit import fitted_probe
from coss_eval.probes.forward import ahead, ready
from coss_eval.receptive_field.theoretical import LocationFields, location_fields
from coss_eval.redundancy import measurement, spectrum
from coss_eval.redundancy.centring import CALIBRATION_IMAGES, RANK, WIDEST
from coss_eval.redundancy.moments import Moments
from coss_eval.statistics import clustered_wilson, paired_difference
from coss_eval.store import Cell, Measurement, own_column
from coss_eval.tasks.redundancy import RedundancyOptions
from coss_eval.tasks.redundancy.votes import Votes, diffused, enough, read_locations
from coss_eval.tasks.task import Result, SplitName, Subject, Task, proportion

VERSION = 3  # 2 took means and ranks over all images, and had no samples; 1 one mean for all positions

PROBE_VERSION = 1  # of what the probe sees at the locations
PROTOCOL = {  # which images give the means that are taken off and, in the same order of hashed ids, the spectra
    "calibration_images": CALIBRATION_IMAGES,
    "spectral_images": spectrum.IMAGES,
    "order_seed": 0,
    "rank": RANK,
    "widest": WIDEST,
}


@dataclass(frozen=True)
class Redundancy(RedundancyOptions, Task):
    """Similarity of the locals at ``site``, in trained and untrained weights; see RedundancyOptions.

    The border is what the theoretical receptive field says: the cells whose fields reach over the image's edge.
    """

    name: ClassVar[str] = "redundancy"
    uses_head: ClassVar[bool] = False

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        shared = {"site": self.site} | PROTOCOL
        cells = [Cell(self.name, shared | {"weights": "trained"}, VERSION)]
        if subject.model.architecture is not None:  # raw pixels have no weights; how a network was made is not known
            cells.append(Cell(self.name, shared | {"weights": "untrained", "seed": seed}, VERSION))
        if self.probe:
            params = {"site": "prepool", "weights": "trained", "probe": _fitted_on(subject), "seed": seed}
            cells.append(Cell(self.name, params, PROBE_VERSION))
        return cells

    def impossible(self, subject: Subject) -> str | None:
        if self.site != "prepool":
            return None
        size, device = subject.image_size, subject.compute.device
        network = subject.model.encoder()
        try:
            with ready(network, device), torch.inference_mode():
                local = network.represent(fixed_images(size)[:1].to(device)).local
        except Exception:  # noqa: BLE001 - a network's own code may fail in any way; its cells will say how
            return None
        return (
            None
            if local.shape[1] > 1
            else f"it compares locations, and the network has one at {size[0]} x {size[1]} px"
        )

    def forwards(self, cell: Cell, subject: Subject) -> float:
        return float(len(subject.data.test))

    def reads(self, subject: Subject) -> list[SplitName]:
        return ["train", "test"] if self.probe else []

    def measure(self, cell: Cell, subject: Subject) -> Result:
        return (
            _read_by_probe(subject, cell.params["seed"]) if "probe" in cell.params else self._similarity(cell, subject)
        )

    def _similarity(self, cell: Cell, subject: Subject) -> Result:
        params, device = cell.params, subject.compute.device
        model = subject.model if params["weights"] == "trained" else subject.model.untrained(params["seed"])
        network = model.encoder()
        with ready(network, device):
            fields, notes = _fields(model.backbone, params["site"], _pixels(network, subject.image_size, device))
            stream = _Stream(network, _shuffled(subject.data.test, params["order_seed"]), subject)
            border = None if fields is None else _border(fields)
            collected = measurement.collect(model.backbone, stream, params["site"], border=border)
        field = None if fields is None or fields.grid is None else (int(fields.size), fields.jump)
        result = _result(collected, field, {"site": params["site"], "weights": params["weights"]}, stream)
        result.notes = [*notes, *result.notes]
        if fields is not None:
            condition = {"site": params["site"], "weights": params["weights"]}
            covered = Measurement("pixels_covered", fields.covered, collected.images, condition=condition)
            result.measurements.append(covered)
        if collected.interior is None:
            result.notes.append("no interior rows: the grid has no two locations away from its border")
        return result


def _fitted_on(subject: Subject) -> dict[str, Any]:
    """What the probe depends on beside the network; UsageError where there is nothing to fit one on."""
    if subject.data.train is None:
        raise UsageError(f"{subject.data.name} has no training split to fit a probe on; leave out --probe")
    return {"train": subject.data.train.fingerprint, "strength": "chosen on a tenth"}


def _read_by_probe(subject: Subject, seed: int) -> Result:
    """The probe of the global representation at the locations before pooling, and on some of its dimensions."""
    train, device = subject.data.train, subject.compute.device
    assert train is not None  # cells() has asked
    probe = fitted_probe(subject.model, train, subject.compute)
    classifier = Classifier(subject.model.backbone, probe.module(), subject.model.preprocessing, origin="a probe")
    with ready(classifier, device):
        found = read_locations(classifier, ahead(subject.batches(), device), seed)
    condition = {"site": "prepool", "weights": "trained"}
    samples: dict[str, Any] = {"id": found.ids.numpy(), "label": found.labels.numpy()}
    result = Result([], samples)
    for metric, values in _of_locations(found).items():
        interval = paired_difference(values[:, None], np.zeros((len(values), 1)))
        result.measurements.append(
            Measurement(metric, interval.difference, len(values), interval.low, interval.high, condition)
        )
        samples[own_column(metric, condition)] = values
    accuracies = {}
    for k, right in found.kept.items():
        kept = condition | {"keep": k}
        result.measurements.append(proportion("kept_accuracy", right.numpy(), **kept))
        samples[own_column("kept_accuracy", kept)] = right.numpy()
        accuracies[k] = float(right.double().mean())
    result.measurements.append(Measurement("locations_for_90", enough(accuracies), len(found.ids), condition=condition))
    features = subject.features(train), subject.features(subject.data.test)
    for share, verdicts in diffused(*features, len(train.classes), probe.strength, seed, device):
        low, high = clustered_wilson(verdicts.numpy())
        part = condition | {"share": share}
        value = float(verdicts.double().mean())
        result.measurements.append(Measurement("diffused_accuracy", value, len(verdicts), low, high, part))
    return result


def _of_locations(found: Votes) -> dict[str, Any]:
    """Each image's own values by metric, the area under the curve of kept locations (over log k) among them."""
    x = np.log2(list(found.kept))
    curve = np.stack([right.numpy() for right in found.kept.values()], axis=1).astype(float)
    area = ((curve[:, 1:] + curve[:, :-1]) / 2 * np.diff(x)).sum(1) / (x[-1] - x[0])
    return {
        "local_accuracy": found.accuracy.numpy(),
        "vote_agreement": found.agreement.numpy(),
        "vote_divergence": found.divergence.numpy(),
        "kept_accuracy_area": area,
    }


def _shuffled(split: Split, seed: int) -> Split:
    """The images in the order of their hashed ids, so that the first ones are like all, whatever the split's order."""
    return split.subset(np.argsort(order_of(split.ids, "redundancy", seed), kind="stable"))


class _Stream:
    """Normalised pixels of a split, read once; what came is remembered by id and label."""

    def __init__(self, network: Classifier, split: Split, subject: Subject) -> None:
        self.network, self.split, self.subject = network, split, subject
        self.ids: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        geometry, compute = self.subject.model.preprocessing.geometry, self.subject.compute
        for batch in ahead(self.split.batches(geometry, batch_size=compute.batch_size), compute.device):
            self.ids.append(batch.ids)
            self.labels.append(batch.labels)
            yield self.network.normalise(to_float(batch.images))


def _result(collected: Moments, field: tuple[int, int] | None, condition: dict[str, Any], stream: _Stream) -> Result:
    """Measurements, and each image's own values beside them."""
    table = measurement.table(collected, field)
    spectral = {"images": collected.covariances.images}
    rows = [
        _measurement(row, condition | (spectral if row["metric"] in spectrum.METRICS else {}))
        for _, row in table.iterrows()
    ]
    samples = {"id": torch.cat(stream.ids).numpy(), "label": torch.cat(stream.labels).numpy()}
    each = measurement.each_image(collected, field)
    shares = {own_column(name, condition): values.float().numpy() for name, values in each.items()}
    return Result(rows, samples | shares, notes=list(table.attrs["notes"]))


def _pixels(network: Classifier, size: tuple[int, int], device: torch.device) -> Tensor:
    """One image as the backbone gets it, whose size is all that matters."""
    return network.normalise(fixed_images(size)[:1].to(device))


def _fields(backbone: Backbone, site: str, pixels: Tensor) -> tuple[LocationFields | None, list[str]]:
    """What the locations see of images like ``pixels``, and notes that say so, or why it is not known."""
    if pixels.shape[-2] != pixels.shape[-1]:
        return None, ["receptive fields are not known for images that are not square: no rows by overlap"]
    try:
        fields = location_fields(backbone, site, pixels.shape[-1])
    except CossError as error:
        return None, [f"the theoretical receptive field is not known ({error}): no rows by overlap"]
    return fields, [describe_fields(fields)]


def describe_fields(fields: LocationFields) -> str:
    """One sentence on what a location sees: "receptive field 9 px, jump 8 px at images of 64 px: ..."."""
    if fields.whole:
        size = "" if math.isinf(fields.size) else f" (receptive field {fields.size:g} px)"
        return (
            f"every location sees the whole image of {fields.image} px{size}: none of them is local, and no two fields "
            "are disjoint"
        )
    border, reaching = _border(fields), fields.border
    if border:
        shown = f"the interior leaves out {border} at each side"
        shown += "" if border == reaching else f", though the fields of {reaching} reach over the edge"
    else:
        shown = "there is no interior"
    return (
        f"receptive field {fields.size:g} px, jump {fields.jump} px at images of {fields.image} px: a location sees "
        f"{100 * fields.seen:.0f} % of the pixels on average, all together {100 * fields.covered:.0f} %; {shown}"
    )


def _border(fields: LocationFields) -> int | None:
    """How many cells at each side the interior leaves out: those that reach over the edge, where others remain; 1 else.

    0 where the grid is too small for any interior, None where it is not known.
    """
    if fields.grid is None:
        return None
    for border in (fields.border, 1):
        height, width = (side - 2 * border for side in fields.grid)
        if border > 0 and min(height, width) > 0 and height * width > 1:
            return border
    return 0


def _measurement(row: pd.Series[Any], condition: dict[str, Any]) -> Measurement:
    low, high = (None if pd.isna(row[bound]) else float(row[bound]) for bound in ("low", "high"))
    return Measurement(row["metric"], float(row["value"]), int(row["n"]), low, high, condition)
