"""How many directions a representation uses, and how much two of its locations tell about each other.

All from D x D moments, in float64. They depend on the number of images (the mutual information of one network was .53
nats at 50 images and 1.14 at 10,000), so they are those of the first 2,000 images of the stream, or of all where there
are fewer: compare only at equal n. Representations wider than ``centring.WIDEST`` pass a fixed random projection first.

Intervals are by the jackknife over 10 groups of those images to first order: a metric's derivative by each moment,
once, in place of its value without each group, which would cost 10 times the eigenvalues.

S_B between images, S_W within an image, S_T in total; they divide by n, so that S_T = S_B + S_W holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit  # not scipy.stats, which takes as long to import as pandas
from torch import Tensor

from coss_eval.redundancy.centring import Centre
from coss_eval.statistics import Jackknifed

IMAGES = 2000
GROUPS = 10
_TINY = 1e-300


@dataclass(frozen=True)
class Products:
    """Means over images of products, float64: what every covariance is made of, and what has a derivative."""

    square: Tensor  # (D, D): of the mean over l of x x^T
    mean_square: Tensor  # (D, D): of m m^T
    mean: Tensor  # (D,): of m
    global_square: Tensor  # (D', D'): of g g^T
    global_: Tensor  # (D',): of g
    global_mean: Tensor  # (D', D): of g m^T

    @property
    def between(self) -> Tensor:
        return self.mean_square - torch.outer(self.mean, self.mean)

    @property
    def within(self) -> Tensor:
        return self.square - self.mean_square

    @property
    def total(self) -> Tensor:
        return self.square - torch.outer(self.mean, self.mean)

    @property
    def global_covariance(self) -> Tensor:
        return self.global_square - torch.outer(self.global_, self.global_)

    @property
    def cross(self) -> Tensor:
        return self.global_mean - torch.outer(self.global_, self.mean)


@dataclass(frozen=True)
class Covariances:
    """The first images' moments, by group where a matrix is wide, by image where a vector is enough."""

    locations: int
    square: Tensor  # (GROUPS, D, D): sum over the group's images of the mean over l of x x^T
    means: Tensor  # (n, D): m
    globals_: Tensor  # (n, D'): g

    @property
    def images(self) -> int:
        return len(self.means)

    def moments(self) -> Products:
        n, m, g = self.images, self.means, self.globals_
        return Products(self.square.sum(0) / n, m.T @ m / n, m.mean(0), g.T @ g / n, g.mean(0), g.T @ m / n)

    @property
    def total(self) -> Tensor:
        """S_T (D, D)."""
        return self.moments().total

    @property
    def between(self) -> Tensor:
        """S_B (D, D)."""
        return self.moments().between

    @property
    def within(self) -> Tensor:
        """S_W (D, D)."""
        return self.moments().within

    @property
    def shrunk(self) -> bool:
        """Whether there are fewer images than dimensions."""
        return self.images <= self.means.shape[1]


class FirstImages:
    """Covariances that grow, until IMAGES images are in them."""

    def __init__(self, centre: Centre) -> None:
        self._centre, self._count = centre, 0
        self._square = torch.zeros(())
        self._means: list[Tensor] = []
        self._globals: list[Tensor] = []

    def add(self, x: Tensor, g: Tensor) -> None:
        """Images' x (B, L, D), one mean taken off, and globals (B, D')."""
        left = IMAGES - self._count
        if left <= 0:
            return
        x, g = self._centre.narrowed(x[:left]), self._centre.narrowed(g[:left])
        if not self._count:
            self._square = x.new_zeros((GROUPS, x.shape[-1], x.shape[-1]))
        for group in range(GROUPS):
            mine = x[(group - self._count) % GROUPS :: GROUPS].flatten(0, 1)
            self._square[group].addmm_(mine.T, mine, alpha=1 / x.shape[1])
        self._means.append(x.mean(1))
        self._globals.append(g.clone())
        self._count += len(x)

    def covariances(self) -> Covariances:
        return Covariances(self._centre.locations, self._square, torch.cat(self._means), torch.cat(self._globals))


def participation_ratio(covariance: Tensor) -> Tensor:
    """(tr S)^2 / ||S||_F^2: between 1 (one direction) and D (all alike); 0 where nothing varies."""
    return covariance.trace() ** 2 / covariance.square().sum().clamp(min=_TINY)


def effective_rank(second_moment: Tensor, samples: int) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1) of a matrix of ``samples`` rows, from its second moment.

    exp(-sum p log p) with p = sigma / sum(sigma) + 1e-7 over the min(samples, D) singular values. Eigenvalues within
    float64 rounding of zero (dead units) count as zero: their square roots would not be small.
    """
    return float(_effective_rank(second_moment, samples))


def _effective_rank(second_moment: Tensor, samples: int) -> Tensor:
    eigenvalues = torch.linalg.eigvalsh(second_moment).flip(0)
    rounding = eigenvalues[0] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    first = eigenvalues[:samples]
    kept = first[first > rounding].sqrt()  # zeros apart: a square root has no derivative there
    return _entropy_rank(torch.cat([kept, kept.new_zeros(len(first) - len(kept))]))


def lidar(between: Tensor, within: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2024, arXiv 2312.04000) with an image as the class and a location as its sample.

    The entropy rank of (S_W + d I)^-1/2 S_B (S_W + d I)^-1/2. ``delta`` is the paper's, absolute: features of another
    scale have another LiDAR.
    """
    return float(_lidar(between, within, delta))


def _lidar(between: Tensor, within: Tensor, delta: float = 1e-4) -> Tensor:
    ridge = delta * torch.eye(len(within)).to(within)
    return _entropy_rank(_relative_eigenvalues(between, within + ridge).clamp(min=0))


def gaussian_mutual_information(between: Tensor, total: Tensor, locations: int, images: int) -> Tensor:
    """Mutual information, in nats, of two locations of one image if they were jointly Gaussian.

    Their covariance is C = (L S_B - S_T) / (L - 1); rho = eig(S_T^-1/2 C S_T^-1/2); -1/2 sum log(1 - rho^2). The joint
    covariance [[S_T, C], [C, S_T]] is first shrunk towards a multiple of the identity by OAS (Chen et al. 2010, eq. 23)
    with the IMAGES as its samples, since locations of one image are not independent. Compare only at equal n and D.
    """
    cross = (locations * between - total) / (locations - 1)
    p = 2 * len(total)
    trace, square = 2 * total.trace(), 2 * (total.square().sum() + cross.square().sum())
    # OAS's own formula, for a matrix of p dimensions and ``images`` samples
    shrinkage = ((1 - 2 / p) * square + trace**2) / ((images + 1 - 2 / p) * (square - trace**2 / p))
    a = shrinkage.clamp(max=1.0)
    shrunk = (1 - a) * total + a * trace / p * torch.eye(len(total)).to(total)
    rho = _relative_eigenvalues((1 - a) * cross, shrunk).clamp(-1 + 1e-12, 1 - 1e-12)
    return -0.5 * torch.log1p(-rho.square()).sum()


def local_global_cka(moments: Products) -> Tensor:
    """Linear CKA (Kornblith et al. 2019) of every location with its image's global representation, of any D'.

    1 where the global tells everything about each location up to a rotation and one scale; ||S_B||_F / ||S_T||_F where
    the global is the mean of the locals; 0 where the global is the same in every image.
    """
    rounding = 1e-12 * moments.global_square.square().sum().sqrt()
    of_globals = torch.maximum(moments.global_covariance.square().sum().sqrt(), rounding)
    of_locals = moments.total.square().sum().sqrt()
    return moments.cross.square().sum() / (of_globals * of_locals).clamp(min=_TINY)


SpectralMetric = Callable[[Products, int, int], Tensor]  # of the moments, L and n

METRICS: dict[str, SpectralMetric] = {
    "participation_ratio_between": lambda m, _, n: participation_ratio(m.between),
    "participation_ratio_within": lambda m, _, n: participation_ratio(m.within),
    "participation_ratio_total": lambda m, _, n: participation_ratio(m.total),
    "effective_rank_between": lambda m, _, n: _effective_rank(m.between, n - 1),
    "effective_rank_within": lambda m, locations, n: _effective_rank(m.within, n * (locations - 1)),
    "effective_rank_total": lambda m, locations, n: _effective_rank(m.total, n * locations - 1),
    "rankme_global": lambda m, _, n: _effective_rank(m.global_square, n),
    "lidar": lambda m, _, n: _lidar(m.between, m.within),
    "gaussian_mutual_information": lambda m, locations, n: gaussian_mutual_information(
        m.between, m.total, locations, n
    ),
    "local_global_cka": lambda m, _, n: local_global_cka(m),
}


def spectra(covariances: Covariances) -> dict[str, Jackknifed]:
    """Every spectral metric by name, with its interval."""
    with torch.inference_mode(mode=False):
        moments = covariances.moments()
    return {name: _estimate(metric, moments, covariances) for name, metric in METRICS.items()}


def _estimate(metric: SpectralMetric, moments: Products, covariances: Covariances) -> Jackknifed:
    """A metric and its interval: Student's on pseudo-values by its first derivative, one a group of images.

    NaN bounds where there are fewer than three images.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        inputs = [value.clone().requires_grad_() for value in vars(moments).values()]
        value = metric(Products(*inputs), covariances.locations, covariances.images)
        gradients = torch.autograd.grad(value, inputs, allow_unused=True) if covariances.images > 2 else ()
    if not gradients:
        return Jackknifed(float(value.detach()), float("nan"), float("nan"))
    known = [torch.zeros_like(one) if g is None else g for one, g in zip(inputs, gradients, strict=True)]
    with torch.no_grad():
        half_width = _half_width(_directions(known, covariances), covariances.images)
    found = float(value.detach())
    return Jackknifed(found, found - half_width, found + half_width)


def _directions(gradients: Sequence[Tensor], covariances: Covariances) -> Tensor:
    """(K,): the sum over each group's images of the metric's derivative towards that image's own moments."""
    square, mean_square, mean, global_square, global_, global_mean = gradients
    m, g = covariances.means, covariances.globals_
    each = ((m @ mean_square) * m).sum(1) + m @ mean
    each = each + ((g @ global_square + m @ global_mean.T) * g).sum(1) + g @ global_
    used = min(GROUPS, len(m))
    groups = torch.arange(len(m), device=m.device) % GROUPS
    rows = each.new_zeros(GROUPS).index_add_(0, groups, each) + (covariances.square * square).sum((1, 2))
    return rows[:used]


def _half_width(sums: Tensor, images: int) -> float:
    """Of the 95 % interval, from each group's sum of derivatives."""
    groups = len(sums)
    counts = torch.tensor([len(range(k, images, GROUPS)) for k in range(groups)], dtype=sums.dtype, device=sums.device)
    left_out = (sums.sum() - sums) / (images - counts)  # the change without each group, but for a constant
    variance = (groups - 1) / groups * float((left_out - left_out.mean()).square().sum())
    width: float = float(stdtrit(groups - 1, 0.975)) * variance**0.5
    return width


def _entropy_rank(values: Tensor) -> Tensor:
    p = values / values.sum().clamp(min=_TINY) + 1e-7
    return torch.exp(-(p * p.log()).sum())


def _relative_eigenvalues(symmetric: Tensor, positive: Tensor) -> Tensor:
    """Eigenvalues of P^-1/2 S P^-1/2, through the Cholesky factor of P, which has the same and costs a tenth."""
    factor = torch.linalg.cholesky(positive)
    half = torch.linalg.solve_triangular(factor, symmetric, upper=False)
    eigenvalues: Tensor = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    return eigenvalues
