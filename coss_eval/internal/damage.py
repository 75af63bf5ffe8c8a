"""Damage inside the network: masking, noise and ablation of a site's activations, one draw an image.

Every kind is two steps. ``draw`` makes the random numbers of a batch from (seed, kind, site, sample id) alone, and
``apply`` damages the activations to a level with them. All levels use the same draw (common random numbers), so masks
are nested, noise only changes its size, and curves over levels are smooth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coss_eval import randomness
from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.backbone import MapLayout, Site

KINDS: dict[str, str] = {
    "element": "single activations are zeroed, independently at every location",
    "channel": "whole channels of an image are zeroed: element masking shared by all locations, its control",
    "location": "whole locations are zeroed; before pooling, the network pools over the kept ones",
    "noise": "Gaussian noise relative to the channel's clean standard deviation, independent at every location",
    "noise-shared": "the same noise with one draw a channel, shared by all locations, its control",
    "ablation": "a growing random set of channels is zeroed, the same for all images",
}
DEFAULT_LEVELS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("element", "channel", "location"), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
    **dict.fromkeys(("noise", "noise-shared"), (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)),
    "ablation": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
_CHANNEL_AXIS: dict[MapLayout, int] = {"nchw": 1, "nhwc": 3, "nlc": 2, "nc": 1}


def kinds_at(site: Site) -> tuple[str, ...]:
    """The kinds that mean something at this site: a pooled vector has no locations to mask, and none to share."""
    spatial = ("location", "element", "noise-shared") if site.layout == "nc" else ()
    return tuple(kind for kind in KINDS if kind not in spatial)


def check_level(kind: str, level: float) -> None:
    """A UsageError for a level outside the kind's range."""
    below, inclusive = (math.inf, False) if kind.startswith("noise") else (1.0, kind == "ablation")
    if not (0 <= level < below or (inclusive and level == below)):
        bracket = "]" if inclusive else ")"
        raise UsageError(f"{kind} takes a level in [0, {below:g}{bracket}, but got {level}")


class DamageDraw(NamedTuple):
    """A batch's random numbers: they hold for every level."""

    values: Tensor  # (B, L) for location masking, else what broadcasts against the activations
    matched: Tensor | None  # bool (B, L): the locations pooled over, where their number is matched


@dataclass(frozen=True)
class Damage:
    """A kind of damage at a site, from a seed; the level and the images come with each call.

    Masking zeroes with probability ``level`` in [0, 1) and divides what is kept by 1 - level only with ``rescale``;
    location masking before pooling always pools over the kept locations instead, and everywhere keeps at least one an
    image. Noise has ``level`` >= 0 times ``std`` (C,), the channels' clean standard deviation (see ``calibrate``).
    Ablation zeroes round(level C) channels, level in [0, 1] (Morcos et al. 2018, arXiv 1803.06959).
    Class and register tokens are treated like locations, but location masking leaves them whole.

    ``match_locations`` (before pooling only) restricts every image to that many random locations from level 0 on:
    independent noise shrinks by the root of their number under mean pooling, so networks compare at an equal one.
    """

    site: Site
    kind: str
    seed: int = 0
    std: Tensor | None = None
    rescale: bool = False
    match_locations: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of internal corruption", self.kind, KINDS)
        if self.kind == "location" and self.site.layout == "nc":
            raise UsageError(f"location masking needs a site with locations, but {self.site.name!r} is one vector")
        if self._is_noise and self.std is None:
            raise UsageError(f"noise needs the channels' clean deviation; pass std=calibrate(...)[{self.site.name!r}]")
        if self.match_locations is not None and self.site.name != "prepool":
            raise UsageError(f"match_locations works before pooling: expected site 'prepool', got {self.site.name!r}")

    @property
    def _is_noise(self) -> bool:
        return self.kind.startswith("noise")

    def draw(self, activations: Tensor, ids: Tensor) -> DamageDraw:
        """The random numbers of a batch: activations in the site's layout, sample ids int64 (B,)."""
        if not isinstance(activations, Tensor):
            raise UsageError(f"site {self.site.name!r} gives a {type(activations).__name__}, but one tensor is needed")
        if len(ids) != len(activations):
            raise UsageError(f"expected one id an image, but got {len(ids)} ids for {len(activations)} images")
        if self.std is not None and len(self.std) != (width := _width(activations, self.site)):
            raise UsageError(f"site {self.site.name!r} has {width} channels, but got {len(self.std)} deviations")
        ids = ids.to(activations.device)
        matched = self._matched(activations, ids)
        if self.kind != "location":
            return DamageDraw(self._numbers(activations, ids), matched)
        u = randomness.uniform(ids, *self._stream, shape=(self._locations(activations),))
        if matched is not None:
            u.masked_fill_(~matched, -1.0)  # below every level: always masked
        return DamageDraw(u.scatter_(1, u.argmax(1, keepdim=True), 1.0), None)  # above every level: one is always kept

    def apply(self, activations: Tensor, draw: DamageDraw, level: float) -> Tensor:
        """The activations damaged to this level; exactly themselves at level 0 (but for matched locations)."""
        if self.kind == "location":
            return self._keep(activations, draw.values >= level, level)
        damaged = activations
        if level > 0 and self._is_noise and self.std is not None:
            sigma = self.std.to(activations).view(_channels(activations, self.site)) * level
            damaged = activations + sigma * draw.values.to(activations.dtype)
        elif level > 0 and not self._is_noise:
            damaged = activations * (draw.values >= level)
            damaged = damaged / (1 - level) if self.rescale and level < 1 else damaged
        return damaged if draw.matched is None else self._keep(damaged, draw.matched, 0.0)

    @property
    def _stream(self) -> tuple[int | str, ...]:
        return ("internal", self.seed, self.kind, self.site.name)

    def _numbers(self, activations: Tensor, ids: Tensor) -> Tensor:
        """What broadcasts against the activations: (B, C, H, W), (B, C, 1, 1), ... in the site's layout."""
        channels = _channels(activations, self.site)
        if self.kind == "ablation":  # the place of each channel in one random order, as a fraction
            u = randomness.uniform(ids.new_zeros(1), *self._stream, shape=channels)
            return (u.flatten().argsort().argsort().view(1, *channels) + 0.5) / u.numel()
        shape = channels if self.kind in ("channel", "noise-shared") else tuple(activations.shape[1:])
        numbers = randomness.normal if self._is_noise else randomness.uniform
        return numbers(ids, *self._stream, shape=shape)

    def _matched(self, activations: Tensor, ids: Tensor) -> Tensor | None:
        """The locations an image is restricted to, bool (B, L)."""
        if self.match_locations is None:
            return None
        locations = self._locations(activations)
        if not 1 <= self.match_locations <= locations:
            raise UsageError(
                f"match_locations {self.match_locations} is impossible: the network has 1 to {locations} locations "
                f"at {self.site.name!r}"
            )
        u = randomness.uniform(ids, "internal", self.seed, "match", shape=(locations,))
        return u.argsort(1).argsort(1) < self.match_locations

    def _locations(self, activations: Tensor) -> int:
        """L, class and register tokens not counted."""
        return math.prod(activations.shape[1:]) // _width(activations, self.site) - self.site.prefix_tokens

    def _keep(self, activations: Tensor, kept: Tensor, level: float) -> Tensor:
        """The activations of the kept locations (B, L), the others zero.

        Before pooling each kept one weighs L / kept, so that the mean over all L is the mean over the kept.
        """
        weights = kept.to(activations.dtype)
        if self.site.name == "prepool":
            weights = weights * (kept.shape[1] / weights.sum(1, keepdim=True))
        elif self.rescale:
            weights = weights / (1 - level)
        if self.site.layout == "nlc":
            weights = torch.cat([weights.new_ones(len(weights), self.site.prefix_tokens), weights], 1)
        shape = list(activations.shape)
        shape[_CHANNEL_AXIS[self.site.layout]] = 1
        return activations * weights.view(shape)


def _width(activations: Tensor, site: Site) -> int:
    """The number of channels C."""
    return activations.shape[_CHANNEL_AXIS[site.layout]]


def _channels(activations: Tensor, site: Site) -> tuple[int, ...]:
    """The shape, without the batch, of one number a channel: (C, 1, 1), (1, 1, C), (1, C) or (C,)."""
    shape = [1] * (activations.dim() - 1)
    shape[_CHANNEL_AXIS[site.layout] - 1] = _width(activations, site)
    return tuple(shape)
