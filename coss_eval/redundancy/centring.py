"""What is taken off representations before they are compared: the means of the stream's first images.

Unit vectors need the means first. To read the images once, these come from a fixed calibration subset, the first 512
images of the stream (all of a shorter one), so a stream should come in a random order, which ``tasks`` sees to. The
representations of those images are kept meanwhile where they take at most 256 MB, and made anew from their pixels where
they take more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from coss_eval.errors import CossError, UsageError

CALIBRATION_IMAGES = 512
RANK = 16  # directions in which networks of any width and rank are compared alike
WIDEST = 2048  # dimensions whose covariances are kept as they are; wider representations are projected
_HELD = 1 << 28  # bytes
_CONSTANT = 1e-6  # of a representation's length: what varies less is rounding in float32
NOT_FINITE = "representations are not finite (NaN or infinity); check the weights and the normalisation"

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]  # local (B, H, W, D) where locations lie on a grid, else (B, L, D); global (B, D')


@dataclass(frozen=True)
class Centre:
    """The means of the calibration images, and what else is fixed before the pass; float64."""

    images: int
    grid: tuple[int, int] | None
    local: Tensor  # (L, D), the mean of each position
    global_: Tensor  # (D',)
    global_is_mean: bool  # the network's global representation is the plain mean of its locals
    constant: Tensor  # (): ||z - mu||^2 up to which a location is the same in every image, but for rounding
    whitening: Tensor | None  # (min(D, WIDEST), RANK); None where fewer directions vary
    projections: dict[int, Tensor]  # (D, WIDEST) by D, for those above WIDEST

    @property
    def locations(self) -> int:
        return self.local.shape[0]

    @property
    def overall(self) -> Tensor:
        """(D,): one mean for all positions."""
        return self.local.mean(0)

    def narrowed(self, x: Tensor) -> Tensor:
        """``x`` (..., D) as it is, or through a fixed Gaussian projection to WIDEST dimensions where D is above it."""
        return x @ self.projections[x.shape[-1]] if x.shape[-1] in self.projections else x

    def check(self, pair: Pair) -> None:
        """UsageError where a batch's representations are of another shape than those before."""
        grid, locations = _shape(pair[0])
        if (grid, locations, pair[0].shape[-1]) != (self.grid, self.locations, self.local.shape[1]):
            raise UsageError(
                f"expected images of one size, but one batch has {self.locations} locations of {self.local.shape[1]} "
                f"dimensions and another {locations} of {pair[0].shape[-1]}; resize them"
            )


def calibrated(batches: Iterable[T], represent: Callable[[T], Pair]) -> tuple[Centre, Iterator[Pair]]:
    """The centre, and ``represent`` of every batch from the first one on; ``batches`` are read once."""
    source = iter(batches)
    sums, held, room = _CalibrationSums(), list[Callable[[], Pair]](), _HELD
    for batch in source:
        pair = represent(batch)
        sums.add(*pair)
        room -= sum(tensor.numel() * tensor.element_size() for tensor in pair)
        held.append(_again(batch, represent) if room < 0 else _kept(pair))
        if sums.images >= CALIBRATION_IMAGES:
            break
    centre = sums.centre()

    def pairs() -> Iterator[Pair]:
        while held:
            yield held.pop(0)()  # popped, so that its memory goes
        for batch in source:
            pair = represent(batch)
            centre.check(pair)
            yield pair

    return centre, pairs()


def _kept(pair: Pair) -> Callable[[], Pair]:
    return lambda: pair


def _again(batch: T, represent: Callable[[T], Pair]) -> Callable[[], Pair]:
    return lambda: represent(batch)


def _shape(local: Tensor) -> tuple[tuple[int, int] | None, int]:
    """The grid, where there is one, and the number of locations."""
    grid = (local.shape[1], local.shape[2]) if local.dim() == 4 else None
    return grid, local.shape[1:-1].numel()


class _CalibrationSums:
    """Sums over the first CALIBRATION_IMAGES images, whatever the batches."""

    def __init__(self) -> None:
        self.images = 0
        self.grid: tuple[int, int] | None = None
        self.local = self.global_ = self.second = self.gap = torch.zeros((), dtype=torch.float64)
        self.projections: dict[int, Tensor] = {}

    def add(self, field: Tensor, global_: Tensor) -> None:
        count = CALIBRATION_IMAGES - self.images
        self.grid, locations = _shape(field)
        z, g = field[:count].flatten(1, -2).double(), global_[:count].double()
        if locations < 2:
            raise UsageError(
                f"redundancy compares locations: expected at least 2 an image, but got {locations}; "
                "take an earlier site or larger images"
            )
        if self.images and self.local.shape != z.shape[1:]:
            raise UsageError("expected images of one size, but two batches differ in their locations; resize them")
        for dim in {z.shape[-1], g.shape[-1]} - self.projections.keys():
            if dim > WIDEST:
                self.projections[dim] = _projection(dim).to(z.device)
        self.images += len(z)
        self.local, self.global_ = self.local.to(z.device) + z.sum(0), self.global_.to(z.device) + g.sum(0)
        flat = z.flatten(0, 1)
        flat = flat @ self.projections[flat.shape[1]] if flat.shape[1] in self.projections else flat
        self.second = self.second.to(z.device) + flat.T @ flat
        m = z.mean(1)
        if m.shape == g.shape:
            gap = (m - g).abs().max() / m.abs().max().clamp(min=1e-12)
            self.gap = torch.maximum(self.gap.to(z.device), gap)
        else:
            self.gap = torch.full_like(m[0, 0], torch.inf)

    def centre(self) -> Centre:
        if self.images < 2:
            raise UsageError(f"redundancy compares images: expected at least 2, but got {self.images}; raise the limit")
        if not bool(self.second.isfinite().all() & self.global_.isfinite().all()):
            raise CossError(NOT_FINITE)
        means = self.local / self.images  # (L, D)
        constant = _CONSTANT**2 * means.square().sum(1).mean()
        narrow = means @ self.projections[means.shape[1]] if means.shape[1] in self.projections else means
        within_positions = self.second / (self.images * len(means)) - narrow.T @ narrow / len(means)
        return Centre(
            self.images,
            self.grid,
            means,
            self.global_ / self.images,
            bool(self.gap < 1e-4),
            constant,
            _whitening(within_positions, constant / narrow.shape[1]),
            self.projections,
        )


def _projection(dim: int) -> Tensor:
    """(dim, WIDEST) Gaussian of a fixed seed, which keeps inner products on average (Johnson and Lindenstrauss)."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(dim, WIDEST, generator=generator, dtype=torch.float64)
    return gaussian / math.sqrt(WIDEST)


def _whitening(covariance: Tensor, least: Tensor) -> Tensor | None:
    """(D, RANK): the first principal directions, each scaled to unit variance."""
    if len(covariance) < RANK:
        return None
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values[-RANK:], vectors[:, -RANK:]
    rounding = torch.maximum(least, 1e-10 * values[-1])
    if not bool((values > rounding).all()):
        return None
    directions: Tensor = vectors / values.sqrt()
    return directions
