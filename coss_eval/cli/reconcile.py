"""`coss-eval reconcile`: what explains the gap between a number as measured and as published. A diagnosis, no score.

The network is read in other usual ways, one change at a time, on the same test images; where none explains the gap and
``pairs`` asks for it, two at a time. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coss_eval.checkpoints.load import load
from coss_eval.checkpoints.normalisation import READINGS
from coss_eval.checkpoints.options import LoadOptions
from coss_eval.data.batches import Batch
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.choices import HeadChoice
from coss_eval.models.heads import resolve_head
from coss_eval.models.model import Model
from coss_eval.probes import predict
from coss_eval.probes.fit import known_classifier
from coss_eval.runtime.device import Compute
from coss_eval.runtime.live import say
from coss_eval.statistics import paired_difference, wilson

CROPS = (0.875, 0.9, 0.95, 224 / 232, 1.0)  # of the recipes of torchvision and timm
SIDES = (224, 256, 288)
KINDS = ("normalise", "channels", "crop", "resize", "size", "head", "branch")
NOTE = "A diagnosis, not a score: it looks at test images. Choose by how the network was trained, then measure anew."


@dataclass(frozen=True)
class Variant:
    """One way to read a network: ``changes`` are those from how it was read at first, ``flags`` what would make them.

    ``kinds`` are what was changed: none is changed twice.
    """

    model: Model
    head: HeadChoice
    reversed: bool = False  # channels in the order blue, green, red
    changes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def changed(self, kind: str, words: str, flag: str, **fields: object) -> Variant:
        """This reading with ``fields`` of itself replaced; of its preprocessing, where they are in there."""
        own = {name: value for name, value in fields.items() if name in ("model", "head", "reversed")}
        inner = {name: value for name, value in fields.items() if name not in own}
        if inner:
            own["model"] = replace(self.model, preprocessing=replace(self.model.preprocessing, **inner))  # type: ignore[arg-type]
        known = {"changes": (*self.changes, words), "flags": (*self.flags, flag), "kinds": (*self.kinds, kind)}
        return replace(self, **own, **known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tried:
    """A reading with its verdict on each image (N,), or why it could not be tried."""

    reading: Variant
    right: NDArray[np.bool_]
    problem: str = ""

    @property
    def accuracy(self) -> float:
        return 100 * float(self.right.mean())

    def interval(self) -> tuple[float, float]:
        """Wilson's, in percent."""
        low, high = wilson(int(self.right.sum()), len(self.right))
        return 100 * low, 100 * high

    def holds(self, expected: float) -> bool:
        """Whether the expected number, in percent, lies in the interval."""
        low, high = self.interval()
        return low <= expected <= high

    def words(self) -> str:
        low, high = self.interval()
        return f"{self.accuracy:.1f} [{low:.1f}, {high:.1f}]"


def reconcile(
    source: str,
    options: LoadOptions,
    data: Dataset,
    *,
    expected: float,
    limit: int = 2000,
    train_limit: int | None = None,
    pairs: bool = False,
    seed: int = 0,
    compute: Compute,
) -> int:
    """Print how the number changes with each change of reading, and which explains the gap; 0 where one does."""
    if not 1 < expected <= 100:
        raise UsageError(f"--expected is in percent, such as 76.1, not {expected:g}")
    small = replace(
        data,
        test=data.test.limited(limit, seed),
        train=data.train if data.train is None or train_limit is None else data.train.limited(train_limit, seed),
    )
    model = load(source, options)
    first = _tried(Variant(model, options.head), small, compute)
    if first.problem:
        raise CossError(f"as read, it cannot be measured: {first.problem}")
    say(f"reconcile   {model.name} on {data.name}: {len(first.right)} of {len(data.test)} test images")
    say(f"as read     {first.words()} %, expected {expected:g}")
    if first.holds(expected):
        say(f"found       no gap to explain on these images: their interval holds {expected:g}; --limit takes more")
        say(f"note        {NOTE}")
        return 0
    singles = list(_changes(first.reading, source, options, small))
    explaining = _try_all(singles, first, small, compute, expected)
    twos = [] if explaining else [two for one in singles for two in _seconds(one, source, options, small)]
    if pairs:
        explaining += _try_all(twos, first, small, compute, expected)
    elif twos:
        say(f"next        --pairs tries two changes at a time, {len(twos)} readings")
    return _say_found(explaining)


def _try_all(
    readings: Sequence[Variant], first: Tried, data: Dataset, compute: Compute, expected: float
) -> list[Tried]:
    """A line for each reading; those whose interval holds the expected number, the nearest first."""
    holding = []
    for reading in readings:
        one = _tried(reading, data, compute)
        _say_line(one, first, expected)
        if not one.problem and one.holds(expected):
            holding.append(one)
    return sorted(holding, key=lambda one: abs(one.accuracy - expected))


def _seconds(one: Variant, source: str, options: LoadOptions, data: Dataset) -> Iterator[Variant]:
    """``one`` with each change of a kind that comes after its own, so that no two are tried twice."""
    later = KINDS[KINDS.index(one.kinds[-1]) + 1 :]
    return (two for two in _changes(one, source, options, data) if two.kinds[-1] in later)


def _say_line(one: Tried, first: Tried, expected: float) -> None:
    kind, words = " + ".join(one.reading.kinds), " + ".join(one.reading.changes)
    if one.problem:
        say(f"{kind:<12}{words}: not possible, {one.problem}")
        return
    found = paired_difference(one.right, first.right)
    change = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    say(f"{kind:<12}{words}: {one.words()} %, {change}{f'; holds {expected:g}' if one.holds(expected) else ''}")


def _say_found(explaining: Sequence[Tried]) -> int:
    for one in explaining:
        say(f"found       {' and '.join(one.reading.changes)} would explain it: {' '.join(one.reading.flags)}")
    if len(explaining) > 1:
        say("            these images do not tell which; the nearest stands first, and --limit takes more")
    if not explaining:
        say("found       none of these explains the gap")
        say("            left: other weights, another split or labels, another protocol of the probe, another decoder")
    say(f"note        {NOTE}")
    return 0 if explaining else 1


def _tried(reading: Variant, data: Dataset, compute: Compute) -> Tried:
    """The verdicts of a reading: no cells, no cache."""
    nothing = np.zeros(0, np.bool_)
    try:
        classifier = known_classifier(reading.model, data, compute, head=reading.head)
        if reading.reversed and classifier.fitted:
            return Tried(reading, nothing, "a probe is fitted on channels as they are")
        batches = data.test.batches(reading.model.preprocessing.geometry)
        turned = (Batch(b.images.flip(1), b.labels, b.ids) if reading.reversed else b for b in batches)
        found = predict(classifier, turned, compute.device)
    except CossError as error:
        return Tried(reading, nothing, str(error))
    return Tried(reading, (found.logits.argmax(1) == found.labels).numpy())


def _changes(reading: Variant, source: str, options: LoadOptions, data: Dataset) -> Iterator[Variant]:
    """All single changes of ``reading`` that these images and this network allow, of kinds not changed yet."""
    kinds = [_normalisations(reading), _geometries(reading, data), _heads(reading, data)]
    kinds.append(_branches(reading, source, options))
    yield from (one for found in kinds for one in found if one.kinds[-1] not in reading.kinds)


def _normalisations(reading: Variant) -> Iterator[Variant]:
    known = reading.model.preprocessing
    for words, (mean, std) in READINGS.items():
        if not (np.allclose(mean, known.mean) and np.allclose(std, known.std)):
            flag = f"--mean {_numbers(mean)} --std {_numbers(std)}"
            yield reading.changed("normalise", words, flag, mean=mean, std=std, said_by="reconcile")
    words = "channels in the order blue, green, red"
    yield reading.changed(
        "channels", words, "(a network of yours that turns them: --arch module:factory)", reversed=True
    )


def _geometries(reading: Variant, data: Dataset) -> Iterator[Variant]:
    """Files are resized and cropped anew; sets of one small size stay as they are, and are resized for the network."""
    known, native = reading.model.preprocessing, data.test.native_size
    if native is None:
        for fraction in CROPS:
            if abs(fraction - known.crop_pct) > 1e-3:
                words, flag = f"the centre crop keeps {fraction:.3g} of the shorter side", f"--crop-pct {fraction:.4g}"
                yield reading.changed("crop", words, flag, crop_pct=fraction)
    if native is None or known.img_size not in (None, native[0]):
        other = "bilinear" if known.interpolation == "bicubic" else "bicubic"
        yield reading.changed("resize", f"{other} resizing", f"--interpolation {other}", interpolation=other)
    if reading.model.backbone.img_size is not None:  # one of tokens takes no other
        return
    current = known.img_size or (native[0] if native else known.geometry.size)
    for side in sorted({*SIDES, *(native[:1] if native else ())} - {current}):
        yield reading.changed("size", f"{side} px", f"--img-size {side}", img_size=side)


def _heads(reading: Variant, data: Dataset) -> Iterator[Variant]:
    uses_own = resolve_head(reading.model, data.classes, reading.head).use_own
    if reading.model.head is not None and not uses_own:
        yield reading.changed("head", "the file's own head, in the data set's order", "--head own", head="own")
    if data.train is not None and uses_own:
        yield reading.changed("head", "a linear probe", "--head probe", head="probe")


def _branches(reading: Variant, source: str, options: LoadOptions) -> Iterator[Variant]:
    """The other networks of the file, such as a teacher beside its student."""
    report = reading.model.report
    for branch in report.branches if report is not None else ():
        if branch != report.branch:  # type: ignore[union-attr]
            other = load(source, replace(options, weights=branch))
            other = replace(other, preprocessing=reading.model.preprocessing)
            yield reading.changed("branch", f"the file's {branch}", f"--weights {branch}", model=other)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
