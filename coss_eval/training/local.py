"""The CO term: every local representation of one view is aligned with the global one of the other (CO-SSL).

It stands beside any method that compares two views and uses that method's own heads and comparison. What the paper
(arXiv 2501.02860) leaves open is a field of LocalConfig.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, isqrt
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import MapLayout, Site, as_locations
from coss_eval.randomness import uniform
from coss_eval.training.method import Heads, Method


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """loss = ``global_weight`` * global term + ``local_weight`` * local term (the paper's w_s, .2 to .5).

    At ``local_weight`` 0 the local term is computed and trains nothing: the low end of a dose-response.
    ``local_grid`` n: n x n locals an image, by average pooling of the map or (``sampling`` "subset") as a random
    subset; capped at the map's size, None takes all. ``heads``: own ones, or the global term's. ``view``: locals meet
    the global of the other view, or of the same (an ablation: it makes locals alike, too). ``site``: where they are
    taken, "prepool" or "stageK"; a linear adapter stands before the heads where the width differs from the global's.
    ``regions`` g: g x g regional globals as targets instead of one; every local meets every region.

    A local is to its image's global what a small view is to a full one, so own ``heads`` may be to CO what a predictor
    of their own is to small views (Config's ``small_predictor``): whoever compares CO with multi-crop gives both. Small
    views' locals take the heads of all locals, also where these are the global term's.
    """

    global_weight: float = 1.0
    local_weight: float = 0.3
    local_grid: int | None = None
    sampling: Literal["pool", "subset"] = "pool"
    heads: Literal["own", "shared"] = "own"
    view: Literal["other", "same"] = "other"
    site: str = "prepool"
    regions: int = 1

    def __post_init__(self) -> None:
        if self.global_weight < 0 or self.local_weight < 0:
            raise UsageError(
                f"global_weight and local_weight must be at least 0, got {self.global_weight} and {self.local_weight}"
            )
        if not isfinite(self.global_weight + self.local_weight):
            raise UsageError(f"weights must be numbers, got {self.global_weight} and {self.local_weight}")
        if self.sampling == "subset" and self.local_grid is None:
            raise UsageError("sampling subset needs local_grid: how many locals, n x n, are drawn")
        if (self.local_grid is not None and self.local_grid < 1) or self.regions < 1:
            raise UsageError(f"local_grid and regions must be at least 1, got {self.local_grid} and {self.regions}")


class LocalTerm(nn.Module):
    """Adapter, heads (the same MLP at every location) and comparison of the local term.

    ``heads`` is None where the config shares the global term's; they are then given in each call.
    """

    def __init__(self, config: LocalConfig, method: Method, *, local_dim: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.adapter = nn.Linear(local_dim, dim) if local_dim != dim else nn.Identity()
        self.heads = method.heads(dim) if config.heads == "own" else None
        self.compare = method.local_comparison()

    def online(self, locations: Tensor, heads: Heads) -> Tensor:
        """Locations (B, L, D) through the adapter and ``heads``: (B, L, P)."""
        count, length, _ = locations.shape
        out: Tensor = heads(self.adapter(locations.flatten(0, 1)))  # (B * L, P)
        return out.view(count, length, -1)

    def loss(self, online: Tensor, targets: Tensor) -> Tensor:
        """One direction: the mean over online (B, L, P) and regional targets (B, R, P) of the comparison."""
        count, length, _ = online.shape
        index = torch.arange(count, device=online.device).repeat_interleave(length)  # (B * L,)
        vectors = online.flatten(0, 1)
        return torch.stack([self.compare(vectors, region, index) for region in targets.unbind(1)]).mean()


class Draw(NamedTuple):
    """What a random subset of locations belongs to: the samples ``ids`` (B,), not their batch."""

    ids: Tensor
    seed: int
    epoch: int
    view: int


def choose(features: Tensor, config: LocalConfig, site: Site, draw: Draw) -> Tensor:
    """The locals (B, L, D) of a map or token sequence at ``site`` that the config asks for."""
    grid = config.local_grid
    locations = as_locations(features, site.layout, site.prefix_tokens)  # (B, L, D)
    if grid is None:
        return locations
    if config.sampling == "subset":
        shape = (locations.shape[1],)
        order = uniform(draw.ids, draw.seed, "locations", draw.epoch, draw.view, shape=shape).argsort(1)
        order = order[:, : grid**2].to(locations.device, non_blocking=True)  # (B, n * n)
        return locations.gather(1, order[:, :, None].expand(-1, -1, locations.shape[2]))
    planes = as_map(features, site.layout, site.prefix_tokens)
    if grid >= max(planes.shape[2:]):
        return locations
    return pooled(planes, grid).flatten(2).transpose(1, 2)


def regional(features: Tensor, regions: int, layout: MapLayout, prefix_tokens: int) -> Tensor:
    """The map as if each region were an image, (B * R, ...) in the same layout, each of one location.

    A backbone's ``pool`` makes a regional global of each. Class tokens become the region's mean too, so that a
    network that hands on its class token has regional globals at all.
    """
    means = pooled(as_map(features, layout, prefix_tokens), regions).flatten(2).transpose(1, 2).flatten(0, 1)
    if layout == "nchw":
        return means[:, :, None, None]  # (B * R, D, 1, 1)
    if layout == "nhwc":
        return means[:, None, None, :]
    return means[:, None, :].expand(-1, prefix_tokens + 1, -1)


def as_map(features: Tensor, layout: MapLayout, prefix_tokens: int) -> Tensor:
    """(B, D, H, W) of any layout that has a square or known grid."""
    if layout == "nchw":
        return features
    if layout == "nhwc":
        return features.permute(0, 3, 1, 2)
    tokens = as_locations(features, layout, prefix_tokens)
    side = isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise UsageError(f"a grid of locals needs a square number of tokens, got {tokens.shape[1]}")
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def pooled(planes: Tensor, side: int) -> Tensor:
    """Average pooling of (B, D, H, W) to at most ``side`` x ``side``: never more than the map has."""
    return F.adaptive_avg_pool2d(planes, (min(side, planes.shape[2]), min(side, planes.shape[3])))
