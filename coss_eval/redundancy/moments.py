"""Everything the redundancy formulas need, as sums of one streaming pass in float64.

Notation (reference: z_nl is location l of image n): m_n = mean over l of z_nl; mu, mu_l = the means of the calibration
images (see ``centring``); x = z - mu; u = x / ||x||; S_n = sum over l of u_nl. Memory does not grow with the number of
images but for a few numbers that each image keeps.

Zero padding marks every place of the grid in all images alike: in an untrained network more than half of the variance
is grid position. So the sums are kept once more with x = z - mu_l, the mean of each position taken off, over all
locations (``per_position``), over those away from the border (``interior``), and in the first RANK principal directions
scaled alike (``rank_matched``): networks that differ in rank differ in cosines by that alone.

Sums are kept for each of up to 20 blocks of images (image i goes to block i mod 20), which makes delete-one-block
jackknife intervals free. D x D moments are those of the first images only: see ``spectrum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from coss_eval.errors import CossError
from coss_eval.redundancy.centring import NOT_FINITE, Centre, Pair, T, calibrated
from coss_eval.redundancy.spectrum import Covariances, FirstImages

BLOCKS = 20
_CHUNK = 1 << 22  # elements of a float64 working copy: 32 MB, whatever the batch size
_PAIRWISE = 1024  # locations: up to so many, all pairs are faster than a Fourier transform


@dataclass(frozen=True)
class Sums:
    """Sums over images, one row a block (K, ...), or one row a sum over blocks; all float64."""

    images: Tensor  # (K,)
    unit: Tensor  # (K, D): sum of S_n
    mean: Tensor  # (K, D): sum of m_n - mu
    unit_square: Tensor  # (K,): sum of ||S_n||^2
    own: Tensor  # (K,): sum of ||u_nl||^2, 1 for each location but those that are the same in every image
    mean_square: Tensor  # (K,): sum of ||m_n - mu||^2
    square: Tensor  # (K,): sum over n of the mean over l of ||x_nl||^2
    leave_one_out: Tensor  # (K,): sum over n of the mean over l of cos(u_nl, S_n - u_nl)
    local_global: Tensor  # (K,): sum over n of the mean over l of cos(x_nl, g_n - mean g); zero where D' != D
    by_distance: (
        Tensor  # (K, F): sum of the cosines of all ordered pairs at each Chebyshev distance from 0; F 0: no grid
    )

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
    """The sums over some of the locations under one centring, and what each image adds to those that are not (K, D)."""

    images: int
    locations: int
    grid: tuple[int, int] | None
    sums: Sums
    each: Mapping[str, Tensor]  # (N, ...) by the name of the sum


@dataclass(frozen=True)
class Moments(CentredSums):
    """The pass's result: the sums with one mean taken off, the other views, and the covariances."""

    per_position: CentredSums
    interior: CentredSums | None  # None: the grid has no two locations away from the border, or there is no grid
    rank_matched: CentredSums | None  # None: fewer directions vary
    position_share: float  # of the variance tr S_T, what the means of the positions make: tr Cov(mu_l) / tr S_T
    centre: Centre
    covariances: Covariances


def collect(batches: Iterable[T], represent: Callable[[T], Pair], border: int = 0) -> Moments:
    """The moments of ``represent`` of the batches, which are read once.

    ``border``: how many cells at each side of the grid the interior leaves out; 0 for no interior.
    The result does not depend on how the images are cut into batches, but for float64 rounding.
    """
    centre, pairs = calibrated(batches, represent)
    inside = _inside(centre, border)
    one_mean = _GrowingSums(centre.grid, centre.locations)
    per_position = _GrowingSums(centre.grid, centre.locations)
    interior = _GrowingSums(None, len(inside))
    rank_matched = _GrowingSums(None, centre.locations)
    first, positions = FirstImages(centre), torch.zeros_like(centre.local)
    seen = 0
    for z, g in _chunks(pairs):
        blocks = torch.arange(seen, seen + len(z), device=z.device) % BLOCKS
        g_unit = _unit(g - centre.global_, centre.constant * 0) if g.shape[-1] == z.shape[-1] else None
        x = z - centre.overall  # (B, L, D)
        one_mean.add(blocks, x, _unit(x, centre.constant), g_unit)
        first.add(x, g)
        x = z - centre.local
        u = _unit(x, centre.constant)
        per_position.add(blocks, x, u)
        positions += x.sum(0)
        if len(inside):
            interior.add(blocks, x[:, inside], u[:, inside])
        if centre.whitening is not None:
            white = centre.narrowed(x) @ centre.whitening
            rank_matched.add(blocks, white, _unit(white, torch.zeros_like(centre.constant)))
        seen += len(z)
    means = centre.local + positions / seen
    plain = one_mean.done()
    return Moments(
        plain.images,
        plain.locations,
        plain.grid,
        plain.sums,
        plain.each,
        per_position.done(),
        interior.done() if len(inside) else None,
        rank_matched.done() if centre.whitening is not None else None,
        _position_share(plain.sums.total(), means),
        centre,
        first.covariances(),
    )


def _position_share(sums: Sums, means: Tensor) -> float:
    """From the sums with one mean taken off, one row, and the means (L, D) of the positions over all images."""
    n = sums.images
    variance = float(sums.square / n - (sums.mean / n).square().sum())
    if variance != variance or variance == float("inf"):
        raise CossError(NOT_FINITE)
    of_positions = float((means - means.mean(0)).square().sum(1).mean())
    if variance - of_positions <= 1e-24 * float(means.square().sum(1).mean()):
        raise CossError(
            "the local representations are the same in every image, so nothing is redundant; check the weights"
        )
    return of_positions / variance


def _inside(centre: Centre, border: int) -> Tensor:
    """The numbers of the locations away from the border, int64; none where fewer than two remain, or without a grid."""
    numbers = torch.arange(centre.locations, device=centre.local.device)
    if centre.grid is None or border < 1 or min(centre.grid) <= 2 * border:
        return numbers[:0]
    inside = numbers.reshape(centre.grid)[border:-border, border:-border].flatten()
    return inside if len(inside) > 1 else inside[:0]


class _GrowingSums:
    """Sums that grow: those of some locations under one centring."""

    def __init__(self, grid: tuple[int, int] | None, locations: int) -> None:
        self.grid, self.locations = grid, locations
        self.vectors: dict[str, Tensor] = {}  # (K, D)
        self.each: dict[str, list[Tensor]] = {}

    def add(self, blocks: Tensor, x: Tensor, u: Tensor, g_unit: Tensor | None = None) -> None:
        """Images' x (B, L, D), their unit vectors, and those of their globals (B, D)."""
        m, s = x.mean(1), u.sum(1)  # (B, D)
        own = u.square().sum(-1)  # (B, L): 1, or 0 where nothing varies
        s_square = s.square().sum(-1)
        alignment = torch.einsum("bld,bd->bl", u, s)  # u . S
        rest = (s_square[:, None] - 2 * alignment + own).clamp(min=1e-300).sqrt()  # ||S - u||
        for name, vectors in (("unit", s), ("mean", m)):
            self.vectors.setdefault(name, vectors.new_zeros((BLOCKS, m.shape[1]))).index_add_(0, blocks, vectors)
        values = {
            "images": torch.ones_like(s_square),
            "unit_square": s_square,
            "own": own.sum(1),
            "mean_square": m.square().sum(-1),
            "square": x.square().sum(-1).mean(1),
            "leave_one_out": ((alignment - own) / rest).mean(1),
            "local_global": torch.zeros_like(s_square) if g_unit is None else (g_unit * s).sum(-1) / self.locations,
            "by_distance": u.new_zeros((len(u), 0)) if self.grid is None else sums_by_distance(u, self.grid),
        }
        for name, value in values.items():
            self.each.setdefault(name, []).append(value)

    def done(self) -> CentredSums:
        each = {name: torch.cat(values) for name, values in self.each.items()}
        images = len(each["images"])
        blocks = torch.arange(images, device=each["images"].device) % BLOCKS
        scalars = {
            name: value.new_zeros((BLOCKS, *value.shape[1:])).index_add_(0, blocks, value)
            for name, value in each.items()
        }
        return CentredSums(images, self.locations, self.grid, Sums(**self.vectors, **scalars), each)


def _unit(x: Tensor, least: Tensor) -> Tensor:
    """x / ||x||; 0 where ||x||^2 is at most ``least``: what is the same in every image points nowhere."""
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > least, square.clamp(min=1e-300).rsqrt(), 0.0)


def _chunks(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Locations flattened to (b, L, D), float64, a few images at a time."""
    for field, global_ in pairs:
        local = field.flatten(1, -2)
        size = max(1, _CHUNK // max(1, local[0].numel(), local.shape[1] ** 2))
        for start in range(0, len(local), size):
            yield local[start : start + size].double(), global_[start : start + size].double()


def distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(L, L) int64: how many steps of the grid lie between two locations, diagonal ones counted once (Chebyshev)."""
    height, width = grid
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())


def sums_by_distance(u: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, F): cosines of unit vectors u (B, L, D) summed over ordered pairs at each distance from 0 to F - 1."""
    count = max(grid)
    if u.shape[1] > _PAIRWISE:
        return _sums_by_displacement(u, grid)
    cosines = (u @ u.transpose(1, 2)).flatten(1)  # (B, L L)
    return u.new_zeros((len(u), count)).index_add_(1, distances(grid, u.device).flatten(), cosines)


def _sums_by_displacement(u: Tensor, grid: tuple[int, int]) -> Tensor:
    """``sums_by_distance`` for large grids: the autocorrelation of the field (Wiener-Khinchin), O(L log L).

    Zero padding to 2H x 2W keeps displacements from wrapping around.
    """
    size = (2 * grid[0], 2 * grid[1])
    spectrum = torch.fft.rfft2(u.transpose(1, 2).reshape(len(u), -1, *grid), s=size)
    power = torch.view_as_real(spectrum).square().sum(dim=(1, -1))  # (B, 2H, W + 1), over channels
    cosines = torch.fft.irfft2(power, s=size).flatten(1)  # by displacement: 0 1 ... H ... 1
    rows, columns = (torch.arange(n, device=u.device).minimum(n - torch.arange(n, device=u.device)) for n in size)
    distance = torch.maximum(rows[:, None], columns[None, :]).flatten()
    inside = distance < max(grid)
    return u.new_zeros((len(u), max(grid))).index_add_(1, distance[inside], cosines[:, inside])
