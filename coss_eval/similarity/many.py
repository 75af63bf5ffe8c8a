"""RSA and Procrustes between all pairs of many representations of the same images, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from scipy import stats
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.similarity.arrays import Array, Compared, jackknifed, rows
from coss_eval.similarity.geometry import Metric, condensed, dissimilarities, procrustes

BLOCKS = 20  # of images, left out one after the other


def rsa_matrix(
    representations: Sequence[Array], *, metric: Metric = "correlation", names: Sequence[str] = ()
) -> Compared:
    """``rsa`` between all ``representations`` (N, D_r) of the same N images, 40 or more for an interval.

    A block is every twentieth image, so give the images in an order that has nothing to do with what they show.
    ``names`` are for errors. It holds 8 bytes for each pair of images and representation: .4 GB for 100 of 1,000
    images.
    """
    count = _images(representations)
    # the rank of each pair of images among all of them tells the order among the pairs of any part of them, too
    orders = [_dense_ranks(condensed(dissimilarities(one, metric=metric))) for one in representations]  # (P,) each
    first, second = torch.triu_indices(count, count, offset=1)  # of each pair, in the order of ``condensed``

    def of(images: Tensor) -> Tensor:
        kept = torch.zeros(count, dtype=torch.bool)
        kept[images] = True
        return _correlations(orders, kept[first] & kept[second], names)

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


def _dense_ranks(values: Tensor) -> Tensor:
    """Each entry's place among the values that occur, int32."""
    return torch.from_numpy(stats.rankdata(values.numpy(), method="dense")).int()


def _correlations(orders: Sequence[Tensor], chosen: Tensor, names: Sequence[str]) -> Tensor:
    """Spearman's correlations between the ``chosen`` ones (P,) of each row of numbers, float64 (R, R)."""
    standard = torch.empty(len(orders), int(chosen.sum()))  # one array, filled row by row: it is the largest here
    for row, order in zip(standard, orders, strict=True):
        rank = torch.from_numpy(stats.rankdata(order[chosen].numpy())).float()
        row.copy_(rank - rank.mean())
    lengths = standard.norm(dim=1, keepdim=True)
    if flat := (lengths.flatten() == 0).nonzero().flatten().tolist():
        which = names[flat[0]] if names else f"representation {flat[0]}"
        raise CossError(f"{which} puts all pairs of images equally far apart: there is no order to compare")
    standard /= lengths
    found = torch.zeros(len(orders), len(orders), dtype=torch.float64)
    for part in torch.split(standard, 1 << 16, dim=1):  # type: ignore[no-untyped-call]
        exact = part.double()
        found += exact @ exact.T
    return found.fill_diagonal_(1)
