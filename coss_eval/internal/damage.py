"""Damage inside the network: the kinds, and masking, noise, ablation and rounding of a site's activations.

Every kind at a site is two steps. ``draw`` makes the random numbers of a batch from (seed, kind, site, sample id)
alone, and ``apply`` damages the activations to a level with them. All levels use the same draw (common random
numbers), so masks are nested, noise only changes its size, and curves over levels are smooth.
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

_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_DEVIATIONS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
BITS = {1 / (2**bits - 1): bits for bits in range(8, 1, -1)}  # a grid's step as a share of its range: its bits


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of damage: levels run from 0, which is none, to ``most``."""

    about: str
    levels: tuple[float, ...]  # by default
    most: float = 1.0
    inclusive: bool = False  # whether ``most`` itself is a level
    local: bool = False  # means something only where there are locations
    noise: bool = False  # relative to the channels' clean deviation, which must be given
    grid: bool = False  # a level is the step of a grid as a share of the values' range, and nothing is drawn
    weights: bool = False  # damages the weights of the whole network, not the activations at a site
    shared: str = ""  # the kind that does alike to all locations: the control of one drawn at each


KINDS: dict[str, Kind] = {
    "element": Kind(
        about="single activations are zeroed, independently at every location",
        levels=_SHARES,
        local=True,
        shared="channel",
    ),
    "channel": Kind(
        about="whole channels of an image are zeroed, at all locations alike: the control of element and location",
        levels=_SHARES,
    ),
    "location": Kind(
        about="whole locations are zeroed; before pooling, the network pools over the kept ones",
        levels=_SHARES,
        local=True,
        shared="channel",
    ),
    "noise": Kind(
        about="Gaussian noise relative to the channel's clean standard deviation, independent at every location",
        levels=_DEVIATIONS,
        most=math.inf,
        noise=True,
        shared="noise-shared",
    ),
    "noise-shared": Kind(
        about="the same noise with one draw a channel, shared by all locations, its control",
        levels=_DEVIATIONS,
        most=math.inf,
        local=True,
        noise=True,
    ),
    "ablation": Kind(
        about="a growing random set of channels is zeroed, the same for all images",
        levels=(*_SHARES, 1.0),
        inclusive=True,
    ),
    "quantised": Kind(
        about="activations are rounded to a grid over their image's range: steps 1/255 (8 bits) to 1/3 (2 bits)",
        levels=tuple(BITS),
        inclusive=True,
        grid=True,
    ),
    "weight-noise": Kind(
        about="Gaussian noise relative to each weight tensor's standard deviation, in the whole network",
        levels=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        most=math.inf,
        weights=True,
    ),
    "weight-quantised": Kind(
        about="each weight tensor is rounded to a grid over its range, in the whole network",
        levels=tuple(BITS),
        inclusive=True,
        grid=True,
        weights=True,
    ),
}
DEFAULT_LEVELS: dict[str, tuple[float, ...]] = {name: kind.levels for name, kind in KINDS.items()}
_CHANNEL_AXIS: dict[MapLayout, int] = {"nchw": 1, "nhwc": 3, "nlc": 2, "nc": 1}


def find_kind(name: str) -> Kind:
    """The kind of that name; a UsageError with the nearest one where there is none."""
    if name not in KINDS:
        raise unknown_name("kind of internal corruption", name, KINDS)
    return KINDS[name]


def kinds_at(site: Site) -> tuple[str, ...]:
    """The kinds that mean something at this site: a pooled vector has no locations to mask, and none to share."""
    return tuple(name for name, kind in KINDS.items() if not kind.weights and not (kind.local and site.layout == "nc"))


def check_level(kind: str, level: float) -> None:
    """A UsageError for a level outside the kind's range."""
    most, inclusive = KINDS[kind].most, KINDS[kind].inclusive
    if not (0 <= level < most or (inclusive and level == most)):
        bracket = "]" if inclusive else ")"
        raise UsageError(f"{kind} takes a level in [0, {most:g}{bracket}, but got {level}")


def to_grid(values: Tensor, level: float) -> Tensor:
    """Values (B, ...) rounded to a uniform grid through 0, of step ``level`` times the range of each row with 0 in it.

    The step 1/(2^b - 1) is that of b bits with the zero point of Jacob et al. (2018, arXiv 1712.05877), section 2.1.
    """
    rows = values.flatten(1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) * level
    step = torch.where(step > 0, step, torch.ones_like(step))  # all zero: they stay so
    zero, last = (-low / step).round(), math.floor(1 / level + 1e-6)
    return (((rows / step).round() + zero).clamp(0, last) - zero).mul(step).view_as(values)


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
    Ablation zeroes round(level C) channels, level in [0, 1] (Morcos et al. 2018, arXiv 1803.06959). Quantisation rounds
    an image's activations to a grid (see ``to_grid``); nothing is drawn for it. Weights: see ``hooks.WeightDamage``.
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
        if find_kind(self.kind).weights:
            raise UsageError(f"{self.kind} damages the weights of the whole network: its site is 'network'")
        if self.kind == "location" and self.site.layout == "nc":
            raise UsageError(f"location masking needs a site with locations, but {self.site.name!r} is one vector")
        if self._is_noise and self.std is None:
            raise UsageError(f"noise needs the channels' clean deviation; pass std=calibrate(...)[{self.site.name!r}]")
        if self.match_locations is not None and self.site.name != "prepool":
            raise UsageError(f"match_locations works before pooling: expected site 'prepool', got {self.site.name!r}")

    @property
    def _is_noise(self) -> bool:
        return KINDS[self.kind].noise

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
        if level > 0 and KINDS[self.kind].grid:
            damaged = to_grid(activations, level)
        elif level > 0 and self._is_noise and self.std is not None:
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
        if KINDS[self.kind].grid:
            return activations.new_empty(0)
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
