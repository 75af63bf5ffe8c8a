"""Parts of a split: balanced or stratified, seeded, nested, and independent of everything but ids and labels."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coss_eval.data.batches import Geometry
from coss_eval.data.choose import sample_ids
from coss_eval.data.images import ArrayImages
from coss_eval.data.split import Split
from coss_eval.errors import CossError, UsageError


def split_of(labels: list[int], classes: int = 6) -> Split:
    keys = [f"train/{i}" for i in range(len(labels))]
    pixels = np.zeros((len(labels), 3, 1, 1), np.uint8)
    names = tuple(f"c{i}" for i in range(classes))
    images = ArrayImages(pixels, keys)
    return Split("train", names, images, np.arange(len(labels)), np.array(labels, np.int64), sample_ids(keys), (1, 1))


LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80)
SEEDS = st.integers(0, 3)


def is_ordered(part: Split, whole: Split) -> bool:
    """A part keeps the order, and each image its own label and id."""
    places = part.indices
    return (
        bool((np.diff(places) > 0).all())
        and np.array_equal(part.labels, whole.labels[places])
        and np.array_equal(part.ids, whole.ids[places])
    )


@given(LABELS, st.integers(1, 90), SEEDS)
def test_limited_is_balanced_and_nested(labels: list[int], n: int, seed: int) -> None:
    split = split_of(labels)
    part = split.limited(n, seed)
    assert len(part) == min(n, len(split))
    assert is_ordered(part, split)
    assert part.limit == (n if n < len(split) else None)
    taken, there = np.bincount(part.labels, minlength=6), np.bincount(split.labels, minlength=6)
    assert (taken <= there).all()
    open_classes = taken < there  # of which more could have been taken
    assert not open_classes.any() or taken.max() - taken[open_classes].min() <= 1
    assert set(part.ids) <= set(split.limited(n + 1, seed).ids)


@given(LABELS, SEEDS, st.randoms(use_true_random=False))
def test_a_choice_does_not_depend_on_the_order(labels: list[int], seed: int, random: object) -> None:
    split = split_of(labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    mixed = split.subset(order)
    assert set(split.limited(5, seed).ids) == set(mixed.limited(5, seed).ids)
    assert set(split.few_labels(0.3, seed).ids) == set(mixed.few_labels(0.3, seed).ids)
    if max(np.bincount(labels)) > 1:
        assert set(split.holdout()[1].ids) == set(mixed.holdout()[1].ids)


@given(LABELS, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_holdout_is_stratified(labels: list[int], fraction: float) -> None:
    split = split_of(labels)
    count = np.bincount(labels, minlength=6)
    if count.max() < 2:
        with pytest.raises(CossError, match="no class has two"):
            split.holdout(fraction)
        return
    fit, select = split.holdout(fraction)
    assert is_ordered(fit, split)
    assert is_ordered(select, split)
    assert not set(fit.ids) & set(select.ids)
    assert len(fit) + len(select) == len(split)
    held = np.bincount(select.labels, minlength=6)
    assert (np.abs(held - fraction * count) <= 0.5)[count >= 10].all()
    assert (held[count > 1] >= 1).all()
    assert (held[count > 0] < count[count > 0]).all()


@given(LABELS, st.sampled_from([0.01, 0.1, 0.5, 1.0]), SEEDS)
def test_few_labels_has_every_class(labels: list[int], fraction: float, seed: int) -> None:
    split = split_of(labels)
    part = split.few_labels(fraction, seed)
    assert set(part.labels) == set(labels)
    assert len(part) == max(len(set(labels)), round(fraction * len(labels)))
    assert is_ordered(part, split)


def test_seeds_and_purposes_choose_differently() -> None:
    split = split_of([i % 6 for i in range(600)])
    chosen = [split.limited(60, seed) for seed in range(3)] + [split.few_labels(0.1), split.holdout()[1]]
    assert len({part.ids.tobytes() for part in chosen}) == len(chosen)
    assert len({part.fingerprint for part in chosen}) == len(chosen)
    assert np.array_equal(split.limited(60, 1).ids, split.limited(60, 1).ids)


def test_choices_are_fixed_for_good() -> None:
    """Results already stored hold only as long as these choices stay."""
    split = split_of([i % 6 for i in range(60)])
    assert split.limited(6).indices.tolist() == [5, 28, 31, 33, 38, 42]
    assert split.holdout()[1].indices.tolist() == [4, 25, 29, 39, 42, 44]
    assert split.few_labels(0.1, seed=1).indices.tolist() == [6, 9, 22, 35, 43, 44]
    assert split.fingerprint == "ba967877d5f078a8a3645942374cf398"  # of all images; it was of 64 before


def test_an_id_is_the_hash_of_its_key() -> None:
    key = "val/n01443537/a b/ü.JPEG"
    first = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "big") >> (512 - 63)
    assert sample_ids([key]).tolist() == [first]
    assert sample_ids([]).shape == (0,)


def test_a_limit_is_remembered_by_what_is_taken_of_it() -> None:
    split = split_of([i % 6 for i in range(60)]).limited(30)
    assert split.holdout()[0].limit == split.subset([1, 2]).limit == 30
    assert split.limited(12).limit == 12
    assert split.limited(99).limit == 30


WRONG = {
    "limit 0": (lambda split: split.limited(0), "limit must be at least 1"),
    "limit -5": (lambda split: split.limited(-5), "got -5"),
    "fraction 0": (lambda split: split.few_labels(0), "above 0 and at most 1"),
    "fraction 2": (lambda split: split.few_labels(2), "got 2"),
    "holdout of all": (lambda split: split.holdout(1.0), "below 1"),
    "a place outside": (lambda split: split.subset([0, 60]), "from 0 to 59, got 0 to 60"),
    "a place before": (lambda split: split.subset([-1]), "got -1"),
    "batch size 0": (lambda split: split.batches(batch_size=0), "batch_size >= 1"),
    "workers -1": (lambda split: split.batches(workers=-1), "workers >= 0"),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_say_so_at_once(call: str) -> None:
    do, message = WRONG[call]
    with pytest.raises(UsageError, match=message) as caught:
        do(split_of([i % 6 for i in range(60)]))
    assert "\n" not in str(caught.value)


def test_an_empty_part_gives_no_batches() -> None:
    split = split_of([0, 1, 2]).subset([])
    assert len(split) == 0
    assert list(split.batches()) == []


def test_protocols() -> None:
    split = split_of([0, 1])
    assert split.protocol() == split.protocol(Geometry(64)) == {"size": [1, 1], "resize": "native"}
