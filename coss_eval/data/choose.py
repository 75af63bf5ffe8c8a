"""Which images of a split to take: seeded, class-balanced or stratified, by hashes of the sample ids.

Nothing here depends on the order of the images or on the other images present, beyond their number per class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def sample_ids(keys: Iterable[str]) -> Ints:
    """int64 (N,): the first 63 bits of each key's blake2b hash."""
    digests = b"".join(hashlib.blake2b(key.encode()).digest()[:8] for key in keys)
    return (np.frombuffer(digests, ">u8") >> np.uint64(1)).astype(np.int64)


def by_value(labels: Ints) -> tuple[list[str], Ints]:
    """Numbers as classes: their names, the numbers that occur as text in rising order, and each label's place there."""
    values, places = np.unique(labels, return_inverse=True)
    return [str(value) for value in values.tolist()], places.astype(np.int64)


def order_of(ids: Ints, purpose: str, seed: int = 0) -> NDArray[np.uint64]:
    """uint64 (N,): a pseudo-random number for each id, another one for every purpose and seed (splitmix64)."""
    salt = hashlib.blake2b(f"{purpose}/{seed}".encode()).digest()[:8]
    x: NDArray[np.uint64] = ids.astype(np.uint64) + np.frombuffer(salt, "<u8")
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def balanced(labels: Ints, ids: Ints, n: int, purpose: str, seed: int) -> Ints:
    """Sorted positions of ``n`` images, as equally many of each class as there are.

    The classes take turns, so that a smaller n is always a subset of a larger one with the same seed.
    """
    order = order_of(ids, purpose, seed)
    turns = _rank_in_class(labels, order)
    return np.sort(np.lexsort((order, turns))[:n])


def stratified(labels: Ints, ids: Ints, fraction: float, purpose: str) -> Bools:
    """True for ``fraction`` of each class; at least one image of a class that has two, and never all of it."""
    count = np.bincount(labels)[labels]
    quota = np.clip(np.floor(fraction * count + 0.5), 1, count - 1)
    held: Bools = _rank_in_class(labels, order_of(ids, purpose)) < quota
    return held


def _rank_in_class(labels: Ints, order: NDArray[np.uint64]) -> Ints:
    """int64 (N,): how many images of the same class come before each one."""
    by_class = np.lexsort((order, labels))
    first = np.searchsorted(labels[by_class], labels[by_class])
    ranks = np.empty(len(labels), np.int64)
    ranks[by_class] = np.arange(len(labels)) - first
    return ranks
