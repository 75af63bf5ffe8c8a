"""The one view of a network that every task needs: pixels to local and global representations, with named sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

MapLayout = Literal["nchw", "nhwc", "nlc", "nc"]


LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL makes grey of colour


class Representations(NamedTuple):
    local: Tensor  # (B, L, D), before pooling
    global_: Tensor  # (B, D'), what the network hands downstream


@dataclass(frozen=True)
class Site:
    """A place inside a network named by its meaning: stage1, stage2, ..., prepool, global.

    ``module`` is the dotted path, inside the Backbone, of the module whose OUTPUT is the site. ``prefix_tokens``
    counts class and register tokens that stand before the locations of an "nlc" sequence.
    """

    name: str
    module: str
    layout: MapLayout
    prefix_tokens: int = 0


class Backbone(nn.Module, ABC):
    """Normalised pixels (B, 3, H, W) to the global representation (B, D'); a family implements the two halves.

    ``prepool`` and ``global_`` are identities that exist to be hooked: the map before pooling and the global
    representation are sites of every network, whatever its family.

    ``memory_format`` is contiguous where the network's own code needs it (``.view`` of a map raises on a channels-last
    one): pixels and weights then keep that layout, whatever those who move and feed the network ask for.
    """

    dim: int  # D', of the global representation
    local_dim: int  # D, of a local representation
    prepool_layout: MapLayout = "nchw"
    prefix_tokens: int = 0
    img_size: int | None = None  # the only side the network takes; None where it takes any
    note: str = ""  # what a person should know of how the network was taken apart
    memory_format: torch.memory_format = torch.channels_last
    cut: int = 1  # the version of how it is taken apart, in keys above 1: raised where a network's locations change
    channels: int = 3  # that the network itself takes; of colour images a grey one (1) gets the luminance
    made_of: tuple[type[nn.Module], ...] = ()  # classes of a network given in memory: a trace has none of their code

    def __init__(self) -> None:
        super().__init__()
        self.prepool = nn.Identity()
        self.global_ = nn.Identity()

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """The map (or token sequence) before pooling, in the family's own layout."""

    @abstractmethod
    def pool(self, features: Tensor) -> Tensor:
        """The global representation (B, D') of such a map."""

    def stage_sites(self) -> tuple[Site, ...]:
        """The sites after each stage or block group, first to last; empty where none is known."""
        return ()

    @property
    def sites(self) -> dict[str, Site]:
        """Every site by name, in the order in which a forward pass reaches them."""
        last = (
            Site("prepool", "prepool", self.prepool_layout, self.prefix_tokens),
            Site("global", "global_", "nc"),
        )
        return {site.name: site for site in (*self.stage_sites(), *last)}

    def forward(self, pixels: Tensor) -> Tensor:
        representation: Tensor = self.global_(self.pool(self.prepool(self.features(self.laid_out(pixels)))))
        return representation

    def represent(self, pixels: Tensor) -> Representations:
        """Local (B, L, D) and global (B, D') representations of one forward pass."""
        features = self.prepool(self.features(self.laid_out(pixels)))
        return Representations(
            as_locations(features, self.prepool_layout, self.prefix_tokens),
            self.global_(self.pool(features)),
        )

    def laid_out(self, pixels: Tensor) -> Tensor:
        """The pixels in the layout and channels that the network's code can take; ``features`` expects them."""
        if self.channels == 1 and pixels.shape[1] == 3:
            pixels = (pixels * pixels.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        return pixels.contiguous() if self.memory_format is torch.contiguous_format else pixels

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What ``to`` does, also that of a module around this one; weights of a contiguous network stay contiguous."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.memory_format is torch.contiguous_format:
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.data = tensor.data.contiguous()
        return self


def as_locations(features: Tensor, layout: MapLayout, prefix_tokens: int = 0) -> Tensor:
    """Any site's output as (B, L, D): one row a location, class and register tokens left out."""
    if layout == "nchw":
        return features.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, L, D)
    if layout == "nhwc":
        return features.flatten(1, 2)  # (B, H, W, D) -> (B, L, D)
    if layout == "nlc":
        return features[:, prefix_tokens:]
    return features.unsqueeze(1)  # (B, D) -> (B, 1, D)
