"""How many directions a representation uses, and how much two of its locations tell about each other.

All from D x D moments, in float64. Symbols as in moments.py: S_B between images, S_W within an image, S_T in total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coss_eval.redundancy.moments import Moments


def participation_ratio(covariance: Tensor) -> float:
    """(tr S)^2 / ||S||_F^2: between 1 (one direction) and D (all alike)."""
    return float(covariance.trace() ** 2 / covariance.square().sum())


def effective_rank(second_moment: Tensor, samples: int) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885, eq. 1) of a matrix of ``samples`` rows, from its second moment.

    exp(-sum p log p) with p = sigma / sum(sigma) + 1e-7 over the min(samples, D) singular values. Eigenvalues within
    float64 rounding of zero (dead units) count as zero: their square roots would not be small.
    """
    eigenvalues = torch.linalg.eigvalsh(second_moment).flip(0)
    rounding = eigenvalues[0] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return _entropy_rank(torch.where(eigenvalues > rounding, eigenvalues, 0.0)[:samples].sqrt())


def lidar(between: Tensor, within: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2024, arXiv 2312.04000) with an image as the class and a location as its sample.

    The entropy rank of (S_W + d I)^-1/2 S_B (S_W + d I)^-1/2. ``delta`` is the paper's, absolute: features of another
    scale have another LiDAR.
    """
    ridge = delta * torch.eye(len(within)).to(within)
    return _entropy_rank(_relative_eigenvalues(between, within + ridge).clamp(min=0))


def gaussian_mutual_information(between: Tensor, total: Tensor, locations: int, images: int) -> float:
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
    return float(-0.5 * torch.log1p(-rho.square()).sum())


def local_global_cka(moments: Moments) -> float:
    """Linear CKA (Kornblith et al. 2019) of every location with its image's global representation, of any D'.

    1 where the global tells everything about each location up to a rotation and one scale; ||S_B||_F / ||S_T||_F where
    the global is the mean of the locals.
    """
    norms = moments.global_covariance.square().sum().sqrt() * moments.total.square().sum().sqrt()
    return float(moments.cross.square().sum() / norms)


def spectra(moments: Moments) -> dict[str, float]:
    """Every spectral metric by name."""
    covariances = {"between": moments.between, "within": moments.within, "total": moments.total}
    rows = {f"participation_ratio_{name}": participation_ratio(s) for name, s in covariances.items()}
    samples = {"between": moments.images - 1, "within": moments.images * (moments.locations - 1)}
    for name, s in covariances.items():
        rows[f"effective_rank_{name}"] = effective_rank(s, samples.get(name, moments.images * moments.locations - 1))
    rows["rankme_global"] = effective_rank(moments.global_second, moments.images)
    rows["lidar"] = lidar(moments.between, moments.within)
    rows["gaussian_mutual_information"] = gaussian_mutual_information(
        moments.between, moments.total, moments.locations, moments.images
    )
    rows["local_global_cka"] = local_global_cka(moments)
    return rows


def _entropy_rank(values: Tensor) -> float:
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def _relative_eigenvalues(symmetric: Tensor, positive: Tensor) -> Tensor:
    """Eigenvalues of P^-1/2 S P^-1/2, through the Cholesky factor of P, which has the same and costs a tenth."""
    factor = torch.linalg.cholesky(positive)
    half = torch.linalg.solve_triangular(factor, symmetric, upper=False)
    eigenvalues: Tensor = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    return eigenvalues
