"""Accuracy over levels of damage at several sites: one clean pass a batch feeds every level, kind and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from coss_eval.data.batches import Batch
from coss_eval.errors import UsageError
from coss_eval.internal.damage import DEFAULT_LEVELS, KINDS, Damage, DamageDraw, check_level, kinds_at
from coss_eval.internal.hooks import NETWORK, WeightDamage
from coss_eval.internal.resume import Resume, resume_from
from coss_eval.internal.scores import SignalToNoise, relative_accuracy
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.hooks import captured, find_site

SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class DamageCurve:
    """One kind of damage at one site. ``baseline`` is undamaged: the clean network, or one on matched locations."""

    site: str
    kind: str
    levels: tuple[float, ...]  # E
    seeds: tuple[int, ...]  # S
    ids: Tensor  # int64 (N,)
    baseline: Tensor  # bool (S, N): correct without damage
    correct: Tensor  # bool (S, E, N)
    snr: Tensor  # float64 (S, E): signal-to-noise ratio of the global representation, in decibel
    notes: tuple[str, ...] = ()

    def table(self, chance: float) -> pd.DataFrame:
        """One row a seed and level: accuracy, its share of the clean accuracy above ``chance``, and the SNR in dB.

        The share is NaN where the clean accuracy is no better than chance.
        """
        rows = []
        for s, seed in enumerate(self.seeds):
            clean = float(self.baseline[s].double().mean())
            for e, level in enumerate(self.levels):
                accuracy = float(self.correct[s, e].double().mean())
                relative = relative_accuracy(accuracy, clean, chance, len(self.ids))
                rows.append(
                    (self.site, self.kind, level, seed, len(self.ids), accuracy, relative, float(self.snr[s, e]))
                )
        columns = ["site", "kind", "level", "seed", "n", "accuracy", "relative_accuracy", "snr_db"]
        return pd.DataFrame(rows, columns=columns)


@torch.inference_mode()
def sweep(
    classifier: Classifier,
    batches: Iterable[Batch],
    sites: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    *,
    levels: Mapping[str, Sequence[float]] = DEFAULT_LEVELS,
    seeds: Sequence[int] = SEEDS,
    std: Mapping[str, Tensor] | None = None,
    rescale: bool = False,
    match_locations: int | None = None,
) -> dict[tuple[str, str], DamageCurve]:
    """Damage at every site (all where None), of every kind, to every level, with every seed; by (site, kind).

    A pair that means nothing (location masking of a vector) is left out, unless both its halves are asked for by name.
    ``levels`` is by kind; ``std`` by site, from ``calibrate``, is needed for noise. The rest: see ``Damage``.
    Results equal those of ``corrupted`` around the whole network, but for float32 rounding, at a fraction of the cost.
    """
    _check_ready(classifier, seeds)
    places = [find_site(classifier.backbone, name) for name in (classifier.backbone.sites if sites is None else sites)]
    pairs = [(place, kind) for place in places for kind in (KINDS if kinds is None else kinds)]
    if sites is None or kinds is None:
        pairs = [(place, kind) for place, kind in pairs if kind in kinds_at(place) or kind not in KINDS]
    tallies = [
        _Tally(
            [Damage(place, kind, seed, (std or {}).get(place.name), rescale, match_locations) for seed in seeds],
            tuple(levels.get(kind, ())),
        )
        for place, kind in pairs
    ]
    resumes: dict[str, Resume] = {}
    device = classifier.mean.device
    for images, labels, ids in batches:
        pixels = classifier.normalise(to_float(images.to(device)))
        with captured(classifier.backbone, places) as activations:
            clean = classifier.backbone(pixels)
        if not resumes:
            resumes = {place.name: resume_from(classifier.backbone, place, pixels[:2]) for place in places}
        seen = _Seen(pixels, labels.to(device), ids.to(device), clean)
        for tally in tallies:
            tally.add(classifier, seen, activations[tally.site], resumes[tally.site])
    return {(tally.site, tally.kind): tally.result(resumes) for tally in tallies}


@torch.inference_mode()
def weight_sweep(
    classifier: Classifier,
    batches: Callable[[], Iterable[Batch]],
    kind: str,
    *,
    levels: Sequence[float] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> DamageCurve:
    """Damage of the backbone's weights to every level, with every seed; the network is left as it was.

    ``batches()`` is asked for once a seed, whose noise is drawn once; every level is a full forward pass. See
    ``WeightDamage``.
    """
    _check_ready(classifier, seeds)
    device, backbone = classifier.mean.device, classifier.backbone
    curves = [_Curve(kind, tuple(KINDS[kind].levels if levels is None else levels)) for _ in seeds]
    for seed, curve in zip(seeds, curves, strict=True):
        damage = WeightDamage(backbone, kind, seed)
        for images, labels, ids in batches():
            pixels = classifier.normalise(to_float(images.to(device)))

            def damaged(level: float, damage: WeightDamage = damage, pixels: Tensor = pixels) -> Tensor:
                with damage.at(level):
                    global_: Tensor = backbone(pixels)
                return global_

            clean = backbone(pixels)
            curve.add(classifier, _Seen(pixels, labels.to(device), ids.to(device), clean), clean, damaged)
    return _joined(NETWORK, kind, seeds, curves, ())


def _check_ready(classifier: Classifier, seeds: Sequence[int]) -> None:
    if classifier.training:
        raise UsageError("internal corruption needs the classifier in eval mode; call classifier.eval()")
    if not seeds:
        raise UsageError("internal corruption needs at least one seed, but got none")


class _Seen(NamedTuple):
    """A batch and the clean network's global representation of it."""

    pixels: Tensor
    labels: Tensor
    ids: Tensor
    clean: Tensor


@dataclass
class _Tally:
    """What one site and kind have shown so far."""

    corruptions: list[Damage]  # one a seed
    levels: tuple[float, ...]
    curves: list[_Curve] = field(default_factory=list)  # one a seed

    def __post_init__(self) -> None:
        self.curves = [_Curve(corruption.kind, self.levels) for corruption in self.corruptions]

    @property
    def site(self) -> str:
        return self.corruptions[0].site.name

    @property
    def kind(self) -> str:
        return self.corruptions[0].kind

    def add(self, classifier: Classifier, seen: _Seen, activations: Tensor, resume: Resume) -> None:
        """One batch: the site's clean activations, damaged by every seed to every level, run to the logits."""
        for corruption, curve in zip(self.corruptions, self.curves, strict=True):
            draw = corruption.draw(activations, seen.ids)
            reference = seen.clean
            if corruption.match_locations is not None:
                reference = resume.run(seen.pixels, corruption.apply(activations, draw, 0.0))

            def damaged(level: float, corruption: Damage = corruption, draw: DamageDraw = draw) -> Tensor:
                return resume.run(seen.pixels, corruption.apply(activations, draw, level))

            curve.add(classifier, seen, reference, damaged)

    def result(self, resumes: Mapping[str, Resume]) -> DamageCurve:
        seeds = [corruption.seed for corruption in self.corruptions]
        note = resumes[self.site].note if resumes else ""
        return _joined(self.site, self.kind, seeds, self.curves, (note,) if note else ())


@dataclass
class _Curve:
    """What one seed has shown so far."""

    kind: str
    levels: tuple[float, ...]  # E
    ids: list[Tensor] = field(default_factory=list)
    baseline: list[Tensor] = field(default_factory=list)  # (B,) each
    correct: list[Tensor] = field(default_factory=list)  # (E, B) each
    snr: list[SignalToNoise] = field(default_factory=list)  # E

    def __post_init__(self) -> None:
        if not self.levels:
            raise UsageError(f"{self.kind} needs at least one level, but got none")
        for level in self.levels:
            check_level(self.kind, level)
        self.snr = [SignalToNoise() for _ in self.levels]

    def add(self, classifier: Classifier, seen: _Seen, reference: Tensor, damaged: Callable[[float], Tensor]) -> None:
        """One batch: the undamaged global representation (B, D'), and a function that damages it to a level."""
        hits = []
        for level, ratio in zip(self.levels, self.snr, strict=True):
            global_ = damaged(level) if level > 0 else reference
            ratio.add(reference, global_)
            hits.append(_correct(classifier, global_, seen.labels))
        self.ids.append(seen.ids.cpu())
        self.baseline.append(_correct(classifier, reference, seen.labels).cpu())
        self.correct.append(torch.stack(hits).cpu())


def _joined(
    site: str, kind: str, seeds: Sequence[int], curves: Sequence[_Curve], notes: tuple[str, ...]
) -> DamageCurve:
    """The seeds' curves as one."""
    if not curves[0].ids:
        raise UsageError("internal corruption needs at least one batch of images, but got none")
    snr = torch.tensor([[ratio.decibel() for ratio in curve.snr] for curve in curves], dtype=torch.float64)
    if max(curves[0].levels) > 0 and bool(snr.isposinf().all()):
        notes += (f"{kind} at {site} changes nothing: what it damages is not read (a class token is)",)
    return DamageCurve(
        site,
        kind,
        curves[0].levels,
        tuple(seeds),
        torch.cat(curves[0].ids),
        torch.stack([torch.cat(curve.baseline) for curve in curves]),
        torch.stack([torch.cat(curve.correct, -1) for curve in curves]),
        snr,
        notes,
    )


def _correct(classifier: Classifier, global_: Tensor, labels: Tensor) -> Tensor:
    """Which images the classifier's head names right, bool (B,)."""
    return classifier.logits(global_).argmax(1) == labels
