"""Accuracy while activations inside the network are damaged: one cell a site and kind, with its levels and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from coss_eval.data.choose import Bools
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.internal import DEFAULT_LEVELS, KINDS, NETWORK, calibrate, check_level, find_kind, kinds_at, mixed
from coss_eval.internal.scores import area_under_curve
from coss_eval.internal.sweep import DamageCurve, sweep, weight_sweep
from coss_eval.models.backbone import Site
from coss_eval.models.classifier import to_float
from coss_eval.models.hooks import find_site
from coss_eval.probes.sites import representations
from coss_eval.redundancy import mixing_weight
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.internal import InternalOptions
from coss_eval.tasks.task import Result, Subject, Task, chance

CALIBRATION_IMAGES = 1000
SURROGATE_IMAGES = 500  # whose redundancy is matched


@dataclass(frozen=True)
class Internal(InternalOptions, Task):
    """Damage at each site, one mask per image, the same masks at every level, or of the weights; see InternalOptions.

    No ``sites`` are every stage and the map before pooling; ``levels`` None the defaults of each kind. ``seeds`` counts
    masks per image: seed, seed + 1, ...
    """

    name: ClassVar[str] = "internal"

    def __post_init__(self) -> None:
        kinds = tuple(KINDS) if "all" in self.kinds else tuple(dict.fromkeys(self.kinds))
        object.__setattr__(self, "kinds", kinds)
        for kind in self.kinds:
            find_kind(kind)
            for level in self.levels or ():
                check_level(kind, level)
        if self.levels is not None and list(self.levels) != sorted(set(self.levels)):
            shown = ", ".join(f"{level:g}" for level in self.levels)
            raise UsageError(f"expected levels in rising order, each once, got {shown}")
        if self.surrogate is not None and not 0 < self.surrogate < 1:
            raise UsageError(f"surrogate is a redundancy between 0 and 1, got {self.surrogate:g}")
        if self.seeds < 1:
            raise UsageError(f"internal corruption needs at least 1 seed, got {self.seeds}")

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        places = [(site, kind) for site in self._sites(subject) for kind in self.kinds if self._is_meant(site, kind)]
        defaults = {"rescale": False, "match_locations": None, "surrogate": None}
        cells = []
        for site, kind in [(place.name, kind) for place, kind in places] + [
            (NETWORK, kind) for kind in self._of_weights
        ]:
            if KINDS[kind].noise and subject.data.train is None:
                continue
            params: dict[str, Any] = {"site": site, "kind": kind}
            params["levels"] = list(self.levels or DEFAULT_LEVELS[kind])
            params |= {"seeds": [0] if KINDS[kind].grid else [seed + i for i in range(self.seeds)]}  # drawn or not
            params |= {"rescale": self.rescale, "match_locations": self.match_locations, "surrogate": self.surrogate}
            if KINDS[kind].noise:
                params["calibration"] = {"images": CALIBRATION_IMAGES, "train": _train(subject).fingerprint}
            cells.append(Cell(self.name, params, defaults=defaults))
        if not cells:
            asked = f"{', '.join(self.kinds)} at {', '.join(site.name for site in self._sites(subject))}"
            only = "; match_locations and surrogate work at site 'prepool' only" if self._is_before_pooling else ""
            lines = "".join(f"; {line}" for line in self.left_out(subject))
            raise UsageError(
                f"there is nothing to measure: {asked} means nothing (a vector has no locations){only}{lines}"
            )
        return cells

    def left_out(self, subject: Subject) -> list[str]:
        noisy = [kind for kind in self.kinds if KINDS[kind].noise]
        if subject.data.train is not None or not noisy:
            return []
        return [f"{subject.data.name} has no training split to calibrate {' and '.join(noisy)} on"]

    def _sites(self, subject: Subject) -> list[Site]:
        backbone = subject.model.backbone
        names = self.sites or tuple(name for name in backbone.sites if name != "global")
        return [find_site(backbone, name) for name in names]

    def _is_meant(self, site: Site, kind: str) -> bool:
        return kind in kinds_at(site) and (not self._is_before_pooling or site.name == "prepool")

    @property
    def _is_before_pooling(self) -> bool:
        """Whether what is asked for is about the locations before pooling alone."""
        return self.match_locations is not None or self.surrogate is not None

    @property
    def _of_weights(self) -> list[str]:
        """The kinds that damage the whole network; its locations are neither matched nor mixed."""
        return [kind for kind in self.kinds if KINDS[kind].weights and not self._is_before_pooling]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        """Levels run the rest of the network only: about half of it, seen over all sites; all of it for weights."""
        levels, seeds = len(cell.params["levels"]), len(cell.params["seeds"])
        if KINDS[cell.params["kind"]].weights:
            return float(len(subject.data.test) * seeds * (1 + levels))
        levels *= seeds
        return len(subject.data.test) * (1 + 0.5 * levels * _share_after(cell, subject))

    def measure(self, cell: Cell, subject: Subject) -> Result:
        site, kind = cell.params["site"], cell.params["kind"]
        surrogate = cell.params["surrogate"]
        weight = 0.0 if surrogate is None else _mixing_weight(subject, surrogate)
        with mixed(subject.classifier, weight) if weight else nullcontext():
            found = _curve(cell, subject)
        place = {"site": site, "kind": kind}

        def verdicts() -> Iterator[tuple[dict[str, Any], Bools]]:
            for s, seed in enumerate(found.seeds):
                yield place | {"level": 0.0, "seed": seed}, found.baseline[s].numpy()
                for e, level in enumerate(found.levels):
                    yield place | {"level": level, "seed": seed}, found.correct[s, e].numpy()

        result = Result.of_verdicts("accuracy", found.ids.numpy(), verdicts())
        result.notes += found.notes
        if surrogate is not None:
            result.notes.append(
                f"a surrogate: each location has {weight:.3f} of its image's mean, so that redundancy is {surrogate:g}"
            )
        result.measurements.append(chance(subject, len(found.ids), **place))
        table = found.table(chance=1 / len(subject.data.classes))
        for row in table.to_dict("records"):
            condition = place | {"level": row["level"], "seed": row["seed"]}
            for metric in ("relative_accuracy", "snr_db"):
                result.measurements.append(Measurement(metric, row[metric], row["n"], condition=condition))
        if table["relative_accuracy"].isna().any():
            result.notes.append(
                f"{kind} at {site}: the clean accuracy is within 3 standard errors of chance: no share kept"
            )
        for seed in found.seeds:
            relative = table.loc[table["seed"] == seed, "relative_accuracy"].tolist()
            area = area_under_curve(found.levels, relative)
            result.measurements.append(Measurement("auc", area, len(found.ids), condition=place | {"seed": seed}))
        return result


def _curve(cell: Cell, subject: Subject) -> DamageCurve:
    """The cell's verdicts, of the weights or at a site."""
    params = cell.params
    site, kind, levels, seeds = (params[name] for name in ("site", "kind", "levels", "seeds"))
    if KINDS[kind].weights:
        return weight_sweep(subject.classifier, subject.batches, kind, levels=levels, seeds=seeds)
    return sweep(
        subject.classifier,
        subject.batches(),
        [site],
        [kind],
        levels={kind: levels},
        seeds=seeds,
        std=_clean_deviation(subject, site) if KINDS[kind].noise else None,
        rescale=params["rescale"],
        match_locations=params["match_locations"],
    )[site, kind]


def _mixing_weight(subject: Subject, redundancy: float) -> float:
    """The weight of the image's mean that gives the locations before pooling this redundancy, on some test images."""
    backbone, normalise = subject.classifier.backbone, subject.classifier.normalise
    parts = []
    with representations(backbone, [find_site(backbone, "prepool")], "all") as found, torch.inference_mode():
        for batch in subject.batches(subject.data.test.limited(SURROGATE_IMAGES, 0)):
            backbone(normalise(to_float(batch.images.to(subject.classifier.mean.device))))
            parts.append(found["prepool"].cpu())
    return mixing_weight(torch.cat(parts), redundancy)


def _share_after(cell: Cell, subject: Subject) -> float:
    """Which part of the network lies after the site, counted in sites."""
    names: Sequence[str] = list(subject.model.backbone.sites)
    return 1 - names.index(cell.params["site"]) / len(names)


def _clean_deviation(subject: Subject, site: str) -> dict[str, Tensor]:
    """The channels' deviation at the site on clean training images."""
    split = _train(subject).limited(CALIBRATION_IMAGES, 0)
    normalise = subject.classifier.normalise
    return calibrate(
        subject.classifier.backbone, (normalise(to_float(batch.images)) for batch in subject.batches(split)), [site]
    )


def _train(subject: Subject) -> Split:
    if subject.data.train is None:
        raise UsageError(f"{subject.data.name} has no training split, which noise inside the network is calibrated on")
    return subject.data.train
