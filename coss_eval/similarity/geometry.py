"""Similarity of the geometry of two representations: of their dissimilarity matrices, and after the best rotation."""

from __future__ import annotations

from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from coss_eval.errors import CossError, UsageError
from coss_eval.similarity.arrays import Array, pair, rows, uncentred

Metric = Literal["correlation", "cosine", "euclidean"]
MOST = 5000  # images: 12.5 million pairs of them


def rsa(x: Array, y: Array, *, metric: Metric = "correlation") -> float:
    """Representational similarity analysis (Kriegeskorte, Mur and Bandettini 2008) of (N, D) and (N, D').

    Spearman's correlation between the dissimilarities of all pairs of images under the one representation and under
    the other. Raises UsageError for arrays that do not fit or more than MOST images, CossError for one that is the same
    for all images.

    >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    >>> round(rsa(x, 3 * x.flip(1)), 6)
    1.0
    """
    pair(x, y, 3)
    ranks = [stats.rankdata(condensed(dissimilarities(array, metric=metric))) for array in (x, y)]
    a, b = (torch.from_numpy(rank) - rank.mean() for rank in ranks)
    scale = (a.square().sum() * b.square().sum()).sqrt()
    if scale <= 0:
        raise CossError("all pairs of images are equally far apart in one representation: there is no order to compare")
    return float((a * b).sum() / scale)


def dissimilarities(x: Array, *, metric: Metric = "correlation") -> Tensor:
    """The dissimilarity of every pair of images, float64 (N, N), of a representation (N, D).

    correlation: 1 - Pearson's r of the two images' units; cosine: 1 - cosine; euclidean: the distance.
    """
    rows(x, "x")  # which refuses one that is the same for all images
    values = uncentred(x, "x")
    if len(values) > MOST:
        raise UsageError(f"dissimilarities of {len(values)} images: take {MOST} of them at most")
    if metric == "euclidean":
        distances: Tensor = torch.cdist(values, values)
        return distances
    if metric == "correlation":
        values = values - values.mean(1, keepdim=True)
    length = values.norm(dim=1, keepdim=True)
    if bool((length == 0).any()):
        alike = "equal" if metric == "correlation" else "0"
        raise CossError(f"the {metric} is not defined for an image whose units are all {alike}: take euclidean")
    unit = values / length
    apart: Tensor = (1 - unit @ unit.T).clamp(min=0)
    return apart.fill_diagonal_(0)


def condensed(matrix: Tensor) -> Tensor:
    """The entries above the diagonal of a symmetric matrix (N, N), row by row: (N (N - 1) / 2,)."""
    row, column = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[row, column]


def procrustes(x: Array, y: Array) -> float:
    """Similarity in [0, 1] after the best rotation and scale: the nuclear norm of Y^T X, both centred and of norm 1.

    1 where one representation is the other up to rotation, reflection and scale; the Procrustes distance of Ding,
    Denain and Steinhardt (2021) is 2 - 2 of it. It grows with the number of units relative to that of images. Raises
    UsageError for arrays that do not fit, CossError for one that is the same for all images.

    >>> x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    >>> round(procrustes(x, 3 * x.flip(1)), 6)
    1.0
    """
    a, b = pair(x, y, 2)
    # the singular values of b^T a from at most N x N: of the factors' triangles where there are more units than images
    a, b = (_reduced(values / values.norm()) for values in (a, b))
    return float(torch.linalg.matrix_norm(b.T @ a, ord="nuc"))


def _reduced(values: Tensor) -> Tensor:
    """The same inner products between images with at most N units."""
    n, units = values.shape
    if units <= n:
        return values
    triangle: Tensor = torch.linalg.qr(values.T, mode="r").R  # (N, N)
    return triangle.T
