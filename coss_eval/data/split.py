"""A split: labelled images in a fixed order, with ids, read as batches; and the parts that may be taken of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coss_eval.data.batches import Batch, Geometry
from coss_eval.data.choose import Ints, balanced, stratified
from coss_eval.data.decode import Size, Target
from coss_eval.data.images import Images
from coss_eval.errors import CossError, UsageError, unknown_name

READ_QUIETLY = 100_000  # images: so many files are read in seconds
LOOK_FURTHER = 5_000  # after the first bad image, so many more are read to name others


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images in a fixed order.

    ``name`` is "train" or "test". ``native_size`` (height, width) is set where all images of the dataset have that
    one small size; they are then never resized. ``limit`` remembers a ``limited`` for the protocol. ``indices`` are
    places in ``images``, which splits taken of one another share, and with it what is decoded already.
    """

    name: str
    classes: tuple[str, ...]
    images: Images
    indices: Ints
    labels: Ints
    ids: Ints
    native_size: Size | None = None
    limit: int | None = None
    skip_bad_images: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        limit = "" if self.limit is None else ", limited"
        return f"Split({self.name}: {len(self):,} images, {len(self.classes)} classes{limit})"

    @property
    def keys(self) -> list[str]:
        """The images' keys: relative paths with their split, or "split/index"."""
        keys: list[str] = self.images.keys.take(self.indices).to_pylist()
        return keys

    def key(self, place: int) -> str:
        """The key of one image."""
        key: str = self.images.keys[int(self.indices[place])].as_py()
        return key

    def short_digests(self) -> NDArray[np.uint64]:
        """uint64 (N,): the first 8 bytes of a hash of each image's stored bytes."""
        first = np.ascontiguousarray(self.images.digests(self.indices)[:, :8])
        return first.view(np.uint64)[:, 0]

    @property
    def bad_images(self) -> dict[str, str]:
        """Key and reason of each image that could not be read in any pass so far."""
        bad = self.images.bad
        here = self.indices[np.isin(self.indices, list(bad))].tolist() if bad else []
        return {self.images.keys[index].as_py(): bad[index] for index in here}

    def mark_left_out(self, read: Ints) -> None:
        """Count the images that are not among the ids ``read`` in an earlier pass over the same files as bad ones."""
        for index in self.indices[~np.isin(self.ids, read)].tolist():
            self.images.bad.setdefault(index, "could not be read before, the file is the same")

    def subset(self, indices: Sequence[int] | Ints) -> Split:
        """The images at these places of this split, in that order."""
        places = np.asarray(indices, np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise UsageError(f"expected places from 0 to {len(self) - 1}, got {places.min()} to {places.max()}")
        return replace(self, indices=self.indices[places], labels=self.labels[places], ids=self.ids[places])

    def restricted(self, classes: Sequence[str]) -> Split:
        """The images of these classes alone, labelled by their place in ``classes``."""
        if tuple(classes) == self.classes:
            return self
        if not classes:
            raise UsageError("a choice of classes needs at least one")
        number = {name: label for label, name in enumerate(classes)}
        for name in number:
            if name not in self.classes:
                raise unknown_name("class", name, self.classes)
        labels = np.array([number.get(name, -1) for name in self.classes])[self.labels]
        chosen = self.subset(np.flatnonzero(labels >= 0))
        return replace(chosen, classes=tuple(number), labels=labels[labels >= 0])

    def limited(self, n: int, seed: int = 0) -> Split:
        """``n`` images, as equally many of each class as there are, seeded; the whole where it has no more."""
        if n < 1:
            raise UsageError(f"the limit must be at least 1 image, got {n}; leave it out to take all {len(self):,}")
        if n >= len(self):
            return self
        return replace(self.subset(balanced(self.labels, self.ids, n, "limit", seed)), limit=n)

    def holdout(self, fraction: float = 0.1) -> tuple[Split, Split]:
        """(fit, select): ``fraction`` of every class is held out, chosen by hashed id.

        At least one image of a class is held out and one stays in fit; classes of a single image stay in fit.
        """
        _check_fraction(fraction, below_one=True)
        held = stratified(self.labels, self.ids, fraction, "holdout")
        if not held.any():
            raise CossError(f"cannot hold out images of {self.name}: no class has two; more images a class are needed")
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))

    def few_labels(self, fraction: float, seed: int = 0) -> Split:
        """``fraction`` of the images (0.01 of 1 % labels), equally many of each class and at least one, seeded."""
        _check_fraction(fraction)
        n = max(len(np.unique(self.labels)), round(fraction * len(self)))
        return self.subset(balanced(self.labels, self.ids, n, "few labels", seed))

    def shuffled(self, random: np.random.Generator) -> Ints:
        """The places 0 ... N - 1 in a random order.

        Where images are read in blocks (row groups of parquet files) and do not stay in memory, the groups come in
        random order and are shuffled some at a time, so that each is read once or twice: as shards and a buffer are.
        """
        blocks = self.images.blocks(self.native_size)
        if blocks is None or len(blocks.ends) <= blocks.together:
            return random.permutation(len(self))
        rank = random.permutation(int(blocks.groups[-1]) + 1)[blocks.groups]
        turn = (
            np.argsort(np.argsort(rank, kind="stable")) // blocks.together
        )  # of each block; those of a group in order
        here = turn[np.searchsorted(blocks.ends, self.indices, side="right")]
        return np.lexsort((random.random(len(self)), here))

    def protocol(self, geometry: Geometry | None = None) -> dict[str, Any]:
        """How these images become pixels, as JSON, for the keys of everything measured on them."""
        target = self._target(geometry)
        if isinstance(target, Geometry):
            return {**asdict(target), "decoder": "PIL"} | ({"exif": True} if self.images.exif else {})
        return {"size": list(target), "resize": "native"} | ({"exif": True} if self.images.exif else {})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of name, classes, labels, ids, limit and the bytes of every image; the same on every machine.

        All images are read the first time, beyond READ_QUIETLY with a warning; later only those that have changed.
        """
        if len(self) > READ_QUIETLY and not self.images.digests_known(self.indices):
            warnings.warn(
                f"identifying {len(self):,} {self.name} images: each is read once, and later only if its file changed",
                stacklevel=2,
            )
        facts = {
            "split": self.name,
            "classes": self.classes,
            "n": len(self),
            "limit": self.limit,
            "labels": hashlib.blake2b(self.labels.astype("<i8").tobytes()).hexdigest(),
            "ids": hashlib.blake2b(self.ids.astype("<i8").tobytes()).hexdigest(),
            "content": hashlib.blake2b(self.images.digests(self.indices).tobytes()).hexdigest(),
        } | ({"exif": True} if self.images.exif else {})
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def refuse_changed(self) -> None:
        """UsageError where an image's file has changed since it was read: the fingerprint is that of the former one."""
        if (index := self.images.changed(self.indices)) is not None:
            key = self.images.keys[index].as_py()
            raise UsageError(f"{key} has changed on disk since the dataset was opened; open it again (load_dataset)")

    @property
    def known_fingerprint(self) -> str | None:
        """The fingerprint where something has asked for it already: reading a large training split takes a while."""
        return self.fingerprint if "fingerprint" in self.__dict__ else None

    def batches(
        self,
        geometry: Geometry | None = None,
        *,
        batch_size: int = 256,
        workers: int | None = None,
        skip_bad_images: bool | None = None,
    ) -> Iterator[Batch]:
        """uint8 batches in the split's order, whatever the batch size and the number of worker processes.

        ``geometry`` is ignored by splits with a native size and needed by all others. ``workers`` None starts as
        many as there are processors where that saves time. Images that cannot be read raise a CossError that counts
        and names them, or, with ``skip_bad_images`` (None: as the dataset was opened), are left out of their batches
        and listed in ``bad_images``: then count the labels that came, not ``len(split)``.
        """
        if batch_size < 1 or (workers is not None and workers < 0):
            raise UsageError(f"expected batch_size >= 1 and workers >= 0, got {batch_size} and {workers}")
        skip = self.skip_bad_images if skip_bad_images is None else skip_bad_images
        return self._batches(self._target(geometry), batch_size, workers, skip)

    def _batches(self, target: Target, batch_size: int, workers: int | None, skip: bool) -> Iterator[Batch]:
        seen, stop_at = 0, None
        for good, pixels in self.images.read(self.indices, target, batch_size, workers):
            rows = slice(seen, seen + len(good))
            seen += len(good)
            if stop_at is None and not (skip or good.all()):
                stop_at = seen + LOOK_FURTHER
            if stop_at is not None:  # the run will stop; first look for other bad images
                if seen >= stop_at:
                    break
            elif len(pixels):
                labels, ids = self.labels[rows][good], self.ids[rows][good]
                yield Batch(torch.from_numpy(pixels), torch.from_numpy(labels), torch.from_numpy(ids))
        if stop_at is not None:
            raise self.bad_images_error(seen)

    def left_out(self) -> str | None:
        """A line on the images that --skip-bad-images has left out so far; None where there are none."""
        bad = self.bad_images
        if not bad:
            return None
        return f"{len(bad)} of {len(self):,} {self.name} images cannot be read and are left out: {_named(bad)}"

    def bad_images_error(self, seen: int) -> CossError:
        """What to raise where images cannot be read: counted among the ``seen`` ones, and named."""
        bad = self.bad_images
        where = f"{seen:,} {self.name} images" if seen == len(self) else f"the first {seen:,} {self.name} images"
        return CossError(
            f"{len(bad)} of {where} cannot be read: {_named(bad)}; mend or remove them, or pass --skip-bad-images"
        )

    def _target(self, geometry: Geometry | None) -> Target:
        if self.native_size is not None:
            return self.native_size
        if geometry is None:
            sizes = f"the {self.name} images are not all of one small size"
            raise UsageError(f"{sizes}: give the model's geometry, batches(model.preprocessing.geometry)")
        return geometry


def _named(bad: dict[str, str]) -> str:
    """The first five keys with their reasons, and how many more there are."""
    first = "; ".join(f"{key} ({why})" for key, why in list(bad.items())[:5])
    return first + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")


def _check_fraction(fraction: float, *, below_one: bool = False) -> None:
    if not 0 < fraction <= 1 or (below_one and fraction == 1):
        raise UsageError(f"expected a fraction above 0 and {'below' if below_one else 'at most'} 1, got {fraction}")
