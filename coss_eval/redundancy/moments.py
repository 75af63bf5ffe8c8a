"""Everything the redundancy formulas need, as sums of one streaming pass in float64.

Notation (reference: z_nl is location l of image n): m_n = mean over l of z_nl; mu = mean of m_n; x = z - mu;
u = x / ||x||; S_n = sum over l of u_nl. Unit vectors need mu first, so the representations are read twice:
once for the means, once for the moments. Memory is O(D^2 + L D) and does not grow with the number of images.

Zero padding marks every place of the grid in all images alike: in an untrained network more than half of the variance
is grid position. So the sums are kept once more with x = z - mu_l, the mean of each position taken off, over all
locations (``per_position``) and over those away from the border (``interior``). S_B and the means over an image are
the same for both; S_T loses the covariance of the mu_l.

First moments are kept for each of up to 20 blocks of images (image i goes to block i mod 20), which makes
delete-one-block jackknife intervals free; D x D moments are kept once and carry no interval.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from coss_eval.errors import CossError, UsageError

BLOCKS = 20
_CHUNK = 1 << 22  # elements of a float64 working copy: 32 MB, whatever the batch size

# yields (local, global): local (B, H, W, D) where locations lie on a grid, else (B, L, D); global (B, D')
NewPass = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Sums:
    """Sums over images, one row a block (K, ...), or one row a sum over blocks; all float64."""

    images: Tensor  # (K,)
    unit: Tensor  # (K, D): sum of S_n
    unit_square: Tensor  # (K,): sum of ||S_n||^2
    mean: Tensor  # (K, D): sum of m_n - mu
    mean_square: Tensor  # (K,): sum of ||m_n - mu||^2
    square: Tensor  # (K,): sum over n of the mean over l of ||x_nl||^2
    leave_one_out: Tensor  # (K,): sum over n of the mean over l of cos(u_nl, S_n - u_nl)
    local_global: Tensor  # (K,): sum over n of the mean over l of cos(x_nl, g_n - mean g); zero where D' != D
    power: Tensor  # (K, 2H, W + 1): power spectrum of the field of u, zero-padded; (K, 0, 0) without a grid

    def total(self) -> Sums:
        """All images: one row."""
        return self._map(lambda rows: rows.sum(0, keepdim=True))

    def without_each(self) -> Sums:
        """All images but those of one block: one row a block that holds images."""
        used = self.images > 0
        return self._map(lambda rows: rows.sum(0, keepdim=True) - rows[used])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Sums:
        return Sums(*(function(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class CentredSums:
    """The sums over some of the locations under one centring."""

    images: int
    locations: int
    grid: tuple[int, int] | None
    sums: Sums


@dataclass(frozen=True)
class Moments(CentredSums):
    """The pass's result: the sums with one mean taken off, the other views, and covariances with that one mean.

    Covariances divide by N, so that S_T = S_B + S_W holds exactly.
    """

    per_position: CentredSums
    interior: CentredSums | None  # None: the grid has no two locations away from the border, or there is no grid
    position_share: float  # of the variance tr S_T, what the means of the positions make: tr Cov(mu_l) / tr S_T
    global_is_mean: bool  # the network's global representation is the plain mean of its locals
    between: Tensor  # (D, D): S_B = Cov(m_n)
    total: Tensor  # (D, D): S_T = mean of x x^T
    global_second: Tensor  # (D', D'): mean of g g^T, not centred
    global_covariance: Tensor  # (D', D')
    cross: Tensor  # (D', D): mean of (g_n - mean g)(m_n - mu)^T

    @property
    def within(self) -> Tensor:
        """S_W (D, D): the mean over images of the covariance inside one image."""
        return self.total - self.between


def collect(source: NewPass, border: int = 0) -> Moments:
    """The moments of what ``source`` yields; it is called twice, and must give the same images both times.

    ``border``: how many cells at each side of the grid the interior leaves out; 0 for no interior.
    The result does not depend on how the images are cut into batches, but for float64 rounding.
    """
    means = _means(source())
    overall = means.local.mean(0)  # (D,)
    dim, global_dim = means.local.shape[1], len(means.global_)
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=means.local.device)
    inside = _inside(means, border)
    grids = [means.grid, means.grid, _inner_grid(means.grid, border)]
    one_mean, per_position, interior = (_zero_sums(dim, grid, means.local.device) for grid in grids)
    between, total = zeros((dim, dim)), zeros((dim, dim))
    global_second, cross = zeros((global_dim, global_dim)), zeros((global_dim, dim))

    seen = 0
    for local, global_ in _chunks(source()):
        z, g = local.double(), global_.double()
        blocks = torch.arange(seen, seen + len(z), device=z.device) % BLOCKS
        g_centred = g - means.global_
        centred = z - means.local  # (B, L, D)
        _add(per_position, blocks, centred, g_centred, grids[1])
        if len(inside):
            _add(interior, blocks, centred[:, inside], g_centred, grids[2])
        x = z - overall
        m = _add(one_mean, blocks, x, g_centred, grids[0])
        between += m.T @ m
        total += torch.tensordot(x, x, dims=([0, 1], [0, 1])) / means.locations
        global_second += g.T @ g
        cross += g_centred.T @ m
        seen += len(z)
    if seen != means.images:
        raise UsageError(
            f"expected the same images on both passes, but the first gave {means.images} and the second {seen}; "
            "pass a list of batches or a function that starts them afresh"
        )
    of_positions = float((means.local - overall).square().sum()) / means.locations
    variance = float(total.trace()) / seen
    if variance - of_positions <= 1e-24 * float(means.local.square().sum(1).mean()):
        raise CossError(
            "the local representations are the same in every image, so nothing is redundant; check the weights"
        )
    return Moments(
        seen,
        means.locations,
        means.grid,
        one_mean,
        CentredSums(seen, means.locations, means.grid, per_position),
        CentredSums(seen, len(inside), grids[2], interior) if len(inside) else None,
        of_positions / variance,
        means.global_is_mean,
        between / seen,
        total / seen,
        global_second / seen,
        global_second / seen - torch.outer(means.global_, means.global_),
        cross / seen,
    )


def _zero_sums(dim: int, grid: tuple[int, int] | None, device: torch.device) -> Sums:
    height, width = grid or (0, -1)
    rows = [(), (dim,), (), (dim,), (), (), (), (), (2 * height, width + 1)]
    return Sums(*(torch.zeros((BLOCKS, *shape), dtype=torch.float64, device=device) for shape in rows))


def _inner_grid(grid: tuple[int, int] | None, border: int) -> tuple[int, int] | None:
    """The grid without its border; None where that leaves fewer than two locations."""
    if grid is None or border < 1 or min(grid) <= 2 * border:
        return None
    inner = (grid[0] - 2 * border, grid[1] - 2 * border)
    return inner if inner[0] * inner[1] > 1 else None


def _inside(means: _Means, border: int) -> Tensor:
    """The numbers of the locations away from the border, int64; none where there is no such grid."""
    numbers = torch.arange(means.locations, device=means.local.device)
    if means.grid is None or _inner_grid(means.grid, border) is None:
        return numbers[:0]
    return numbers.reshape(means.grid)[border:-border, border:-border].flatten()


@dataclass(frozen=True)
class _Means:
    images: int
    locations: int
    grid: tuple[int, int] | None
    local: Tensor  # (L, D), the mean of each position
    global_: Tensor  # (D',)
    global_is_mean: bool


def _means(batches: Iterable[tuple[Tensor, Tensor]]) -> _Means:
    """First pass: dataset means of the local and the global representation."""
    images, locations, gap = 0, 0, 0.0
    grid: tuple[int, int] | None = None
    local_sum = global_sum = torch.zeros(())
    for field, global_ in batches:
        if not (torch.isfinite(field).all() and torch.isfinite(global_).all()):
            raise CossError("representations are not finite (NaN or infinity); check the weights and the normalisation")
        grid = (field.shape[1], field.shape[2]) if field.dim() == 4 else None
        images, locations = images + len(field), math.prod(field.shape[1:-1])
        local, g = field.flatten(1, -2), global_.double()
        m = local.mean(1, dtype=torch.float64)
        local_sum = local_sum.to(m) + local.sum(0, dtype=torch.float64)
        global_sum = global_sum.to(g) + g.sum(0)
        gap = max(gap, float((m - g).abs().max() / m.abs().max().clamp(min=1e-12))) if m.shape == g.shape else math.inf
    if images < 2:
        raise UsageError(f"redundancy compares images: expected at least 2, but got {images}; raise the limit")
    if locations < 2:
        raise UsageError(f"redundancy compares locations: expected at least 2 an image, but got {locations}")
    return _Means(images, locations, grid, local_sum / images, global_sum / images, gap < 1e-4)


def _add(sums: Sums, blocks: Tensor, x: Tensor, g: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Add a chunk's images to their blocks: x (B, L, D) and g (B, D') centred; the mean of x over locations (B, D)."""
    m = x.mean(1)
    u = F.normalize(x, dim=-1, eps=1e-300)
    s = u.sum(1)  # (B, D)
    s_square = s.square().sum(-1)
    alignment = torch.einsum("bld,bd->bl", u, s)  # u . S
    rest = (s_square[:, None] - 2 * alignment + 1).clamp(min=1e-300).sqrt()  # ||S - u||
    for field, values in (
        (sums.images, torch.ones_like(s_square)),
        (sums.unit, s),
        (sums.unit_square, s_square),
        (sums.mean, m),
        (sums.mean_square, m.square().sum(-1)),
        (sums.square, x.square().sum(-1).mean(1)),
        (sums.leave_one_out, ((alignment - 1) / rest).mean(1)),
    ):
        field.index_add_(0, blocks, values)
    if g.shape == m.shape:
        sums.local_global.index_add_(0, blocks, (F.normalize(g, dim=-1, eps=1e-300) * s).sum(-1) / x.shape[1])
    if grid is not None:
        sums.power.index_add_(0, blocks, _power(u, grid))
    return m


def _power(u: Tensor, grid: tuple[int, int]) -> Tensor:
    """Power spectrum (B, 2H, W + 1), summed over channels, of unit vectors u (B, L, D) laid out on the grid.

    Its inverse transform is the autocorrelation: the sum of cosines at every displacement (Wiener-Khinchin), for
    O(L log L) work and O(L) memory an image where the L x L cosines would take O(L^2). Zero padding to 2H x 2W
    keeps displacements from wrapping around.
    """
    height, width = grid
    field = u.transpose(1, 2).reshape(len(u), -1, height, width)  # (B, D, H, W)
    spectrum = torch.fft.rfft2(field, s=(2 * height, 2 * width))
    return torch.view_as_real(spectrum).square().sum(dim=(1, -1))


def _chunks(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Locations flattened to (b, L, D), a few images at a time."""
    for field, global_ in batches:
        size = max(1, _CHUNK // max(1, field[0].numel()))
        local = field.flatten(1, -2)
        for start in range(0, len(local), size):
            yield local[start : start + size], global_[start : start + size]
