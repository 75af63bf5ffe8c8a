"""RSA and Procrustes between all pairs of many representations of the same images, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.similarity.arrays import Array, Compared, jackknifed, rows
from coss_eval.similarity.geometry import Metric, condensed, dissimilarities, procrustes

BLOCKS = 20  # of images, left out one after the other
SPOOLED = 2**28  # bytes of rows that stay in memory; more go into a temporary file, which TMPDIR places
COLUMNS = 2**16  # of all rows that are multiplied at a time


def rsa_matrix(
    representations: Sequence[Array], *, metric: Metric = "correlation", names: Sequence[str] = ()
) -> Compared:
    """``rsa`` between all ``representations`` (N, D_r) of the same N images, 40 or more for an interval.

    A block is every twentieth image, so give the images in an order that has nothing to do with what they show.
    ``names`` are for errors. Memory does not grow with the number of representations: 8 bytes for each pair of images
    and representation lie in a temporary file, .4 GB for 100 of 1,000 images and 10 GB for 100 of 5,000.
    """
    count = _images(representations)
    pairs = count * (count - 1) // 2
    with _RowFile(pairs, np.dtype(np.int32)) as orders, _RowFile(pairs, np.dtype(np.float32)) as standard:
        for row, one in enumerate(representations):
            # the rank of each pair of images among all of them tells the order among the pairs of any part of them, too
            apart = condensed(dissimilarities(one, metric=metric)).numpy()
            orders.put(row, stats.rankdata(apart, method="dense").astype(np.int32))

        def of(images: Tensor) -> Tensor:
            kept = torch.zeros(count, dtype=torch.bool)
            kept[images] = True
            chosen = torch.cat([kept[i + 1 :] & kept[i] for i in range(count)]).numpy()  # as ``condensed`` orders pairs
            for row in range(len(representations)):
                what = names[row] if names else f"representation {row}"
                standard.put(row, _standard_ranks(orders.get(row)[chosen], what))
            return _products(standard, len(representations), int(chosen.sum()))

        return jackknifed(of(torch.arange(count)), map(of, without_each(count)))


def procrustes_matrix(representations: Sequence[Array], *, names: Sequence[str] = ()) -> Compared:
    """``procrustes`` between all ``representations`` (N, D_r) of the same N images; blocks as in ``rsa_matrix``."""
    count = _images(representations)
    given = [rows(one, name) for one, name in zip(representations, names or [""] * len(representations), strict=True)]

    def of(images: Tensor) -> Tensor:
        found = torch.eye(len(given), dtype=torch.float64)
        for i, first in enumerate(given):
            for j in range(i):
                found[i, j] = found[j, i] = procrustes(first[images], given[j][images])
        return found

    return jackknifed(of(torch.arange(count)), map(of, without_each(count)))


def _images(representations: Sequence[Array]) -> int:
    counts = sorted({len(one) for one in representations})
    if len(counts) != 1:
        raise UsageError(f"give every representation of the same images, in one order; got {counts} images")
    return counts[0]


def without_each(count: int) -> Iterator[Tensor]:
    """The images, of ``count``, that are left without each block; nothing where a block would hold a single image."""
    places = torch.arange(count)
    for block in range(BLOCKS if count >= 2 * BLOCKS else 0):
        yield places[places % BLOCKS != block]


class _RowFile:
    """Rows of numbers of one type, in a temporary file where they are many: memory holds what is asked for."""

    def __init__(self, length: int, dtype: np.dtype[Any]) -> None:
        self._length, self._dtype = length, dtype
        self._file = SpooledTemporaryFile(max_size=SPOOLED)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> _RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, row: int, values: NDArray[Any]) -> None:
        """Write a row, which may be shorter than ``length``. Raises CossError where the disk is full."""
        try:
            self._file.seek(row * self._length * self._dtype.itemsize)
            self._file.write(np.ascontiguousarray(values, self._dtype).data)
        except OSError as error:
            raise CossError(
                f"cannot write a temporary file ({error.strerror}): take fewer images, or set TMPDIR to one with room"
            ) from error

    def get(self, row: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """A row, or the part of it from ``start`` to ``stop``."""
        stop = self._length if stop is None else stop
        self._file.seek((row * self._length + start) * self._dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * self._dtype.itemsize), self._dtype)


def _standard_ranks(order: NDArray[np.int32], what: str) -> NDArray[np.float32]:
    """The ranks (P,) of numbers whose places among some values are known, of mean 0 and length 1; equals share one."""
    counts = np.bincount(order)  # by place: no sorting
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order].astype(np.float32)
    found = torch.from_numpy(ranks)
    found -= found.mean()
    length = found.norm()
    if length == 0:
        raise CossError(f"{what} puts all pairs of images equally far apart: there is no order to compare")
    found /= length
    return ranks


def _products(rows: _RowFile, count: int, length: int) -> Tensor:
    """The inner products of ``count`` rows over their first ``length`` entries, float64, with 1 on the diagonal."""
    found = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, length, COLUMNS):
        part = np.stack([rows.get(row, start, min(start + COLUMNS, length)) for row in range(count)])
        exact = torch.from_numpy(part).double()
        found += exact @ exact.T
    return found.fill_diagonal_(1)
