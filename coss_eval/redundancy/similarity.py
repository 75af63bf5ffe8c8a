"""How much the locations of one image share: cosines and shares of variance, each with a jackknife interval."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.special import stdtrit  # not scipy.stats, which takes as long to import as pandas
from torch import Tensor

from coss_eval.errors import UsageError
from coss_eval.redundancy.moments import CentredSums, Moments, Sums
from coss_eval.statistics import Jackknifed

Statistic = Callable[[Sums, int], Tensor]


def within(sums: Sums, locations: int) -> Tensor:
    """Mean cosine of two different locations of one image: (Q - N L) / (N L (L - 1)).

    A location that is the same in every image agrees with none.
    """
    return (sums.unit_square - sums.own) / (sums.images * locations * (locations - 1))


def between(sums: Sums, locations: int) -> Tensor:
    """Mean cosine of two locations of different images: (||T||^2 - Q) / (N (N - 1) L^2)."""
    n = sums.images
    return (sums.unit.square().sum(-1) - sums.unit_square) / (n * (n - 1) * locations**2)


def normalised(sums: Sums, locations: int) -> Tensor:
    """(within - between) / (1 - between): 0 where locations agree no more than images do, 1 where all are equal."""
    baseline = between(sums, locations)
    return (within(sums, locations) - baseline) / (1 - baseline)


def mixing_weight(local: Tensor, redundancy: float) -> float:
    """How much of its image's mean each of ``local`` (N, L, D) needs to have this redundancy; see ``internal.mixed``.

    Redundancy is (within - between) / (1 - between), the mean of each grid position taken off; it rises with the weight
    to 1. Raises UsageError where it is above the one asked for already, and for what is no redundancy below 1.
    """
    values = local.double()
    if values.ndim != 3 or values.shape[0] < 2 or values.shape[1] < 2:
        raise UsageError(f"mixing needs (images, locations, units), 2 or more of each, got {tuple(local.shape)}")
    centred = values - values.mean(0)  # of a mixture it is the mixture of this and its mean
    own = _redundancy(centred)
    if not own <= redundancy < 1:
        raise UsageError(f"its redundancy is {own:.3f}, and mixing raises it to below 1: {redundancy:g} cannot be had")
    mean = centred.mean(1, keepdim=True)
    low, high = 0.0, 1.0
    for _ in range(24):
        weight = (low + high) / 2
        above = _redundancy(torch.lerp(centred, mean.expand_as(centred), weight)) >= redundancy
        low, high = (low, weight) if above else (weight, high)
    return high


def _redundancy(centred: Tensor) -> float:
    """Of (N, L, D): the mean cosine between locations of an image beyond that between images, as a share."""
    n, locations, _ = centred.shape
    sums = torch.nn.functional.normalize(centred, dim=-1).sum(1)  # (N, D)
    own = float(sums.square().sum())
    alike = (own - n * locations) / (n * locations * (locations - 1))
    others = (float(sums.sum(0).square().sum()) - own) / (n * (n - 1) * locations**2)
    return (alike - others) / (1 - others)


def r2(sums: Sums, locations: int) -> Tensor:
    """Share of the variance explained by the image's mean: tr S_B / tr S_T. Its floor is 1 / L, not 0."""
    shift = sums.mean.square().sum(-1) / sums.images  # the mean of a subset of images is not mu
    return (sums.mean_square - shift) / (sums.square - shift)


def icc(sums: Sums, locations: int) -> Tensor:
    """Intraclass correlation ICC(1), over traces: (MSB - MSW) / (MSB + (L - 1) MSW) (Shrout and Fleiss 1979)."""
    n = sums.images
    shift = sums.mean.square().sum(-1) / n
    msb = locations * (sums.mean_square - shift) / (n - 1)
    msw = locations * (sums.square - sums.mean_square) / (n * (locations - 1))
    return (msb - msw) / (msb + (locations - 1) * msw)


def local_global_leave_one_out(sums: Sums, locations: int) -> Tensor:
    """Mean of cos(u_l, S - u_l): a location against the mean of the OTHERS.

    The plain cosine with a mean-pooled global holds the location itself: it is the norm of the mean unit vector,
    tells nothing beyond ``within`` and has a floor of about 1 / sqrt(L).
    """
    return sums.leave_one_out / sums.images


def local_global(sums: Sums, locations: int) -> Tensor:
    """Mean cosine of a location with the network's own global representation, both centred; only where D' = D."""
    return sums.local_global / sums.images


SIMILARITIES: dict[str, Statistic] = {
    "within": within,
    "between": between,
    "normalised": normalised,
    "r2": r2,
    "icc": icc,
    "local_global_leave_one_out": local_global_leave_one_out,
}
COSINES: dict[str, Statistic] = {"within": within, "between": between, "normalised": normalised}


def estimates(moments: Moments) -> dict[str, Jackknifed]:
    """Every similarity that is defined for these moments, by metric name; one mean is taken off all locations."""
    statistics = dict(SIMILARITIES)
    if moments.centre.local.shape[1] == len(moments.centre.global_) and not moments.centre.global_is_mean:
        statistics["local_global"] = local_global
    return {name: jackknife(statistic, moments) for name, statistic in statistics.items()}


def estimates_per_position(moments: Moments) -> dict[str, Jackknifed]:
    """The similarities with the mean of each grid position taken off, of the interior, and at equal rank."""
    return {
        f"{name}{end}": jackknife(statistic, sums)
        for end, (sums, statistics) in _views(moments).items()
        for name, statistic in statistics.items()
    }


def each_image(moments: Moments) -> dict[str, Tensor]:
    """What each image alone shows, (N,), by the metric whose mean over the images it has.

    The baseline between images is that of all, held fixed. A ratio over all images (r2) is that ratio and the image's
    first-order share in it.
    """
    rows: dict[str, Tensor] = {}
    for end, (sums, _) in _views(moments).items():
        each, total, locations = sums.each, sums.sums.total(), sums.locations
        baseline = between(total, locations)
        rows[f"within{end}"] = (each["unit_square"] - each["own"]) / (locations * (locations - 1))
        rows[f"normalised{end}"] = (rows[f"within{end}"] - baseline) / (1 - baseline)
    each, total = moments.per_position.each, moments.per_position.sums.total()
    rows["local_global_leave_one_out_per_position"] = each["leave_one_out"]
    share = r2(total, moments.locations)
    shift = total.mean.square().sum() / total.images**2
    residual = (each["mean_square"] - shift) - share * (each["square"] - shift)
    rows["r2_per_position"] = share + residual / (total.square / total.images - shift)
    return rows


def _views(moments: Moments) -> dict[str, tuple[CentredSums, dict[str, Statistic]]]:
    """The sums with each position's mean taken off, by the end of their rows' names."""
    views: dict[str, tuple[CentredSums, dict[str, Statistic]]] = {"_per_position": (moments.per_position, SIMILARITIES)}
    if moments.interior is not None:
        views["_interior"] = (moments.interior, COSINES)
    if moments.rank_matched is not None:
        views["_rank_matched"] = (moments.rank_matched, COSINES)
    return views


def jackknife(statistic: Statistic, moments: CentredSums) -> Jackknifed:
    """The statistic of all images with its interval; the centring mean mu is held fixed when a block is left out.

    With fewer than three images no block can be left out of a comparison of images: the interval is NaN.
    """
    value = float(statistic(moments.sums.total(), moments.locations))
    if moments.images < 3:
        return Jackknifed(value, float("nan"), float("nan"))
    left_out = statistic(moments.sums.without_each(), moments.locations)  # (K,)
    blocks = len(left_out)
    variance = (blocks - 1) / blocks * float((left_out - left_out.mean()).square().sum())
    half_width = float(stdtrit(blocks - 1, 0.975)) * variance**0.5
    return Jackknifed(value, value - half_width, value + half_width)
