"""What a network makes of images at its sites: a vector a location, or their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.hooks import Hook, hooked

Locations = Literal["mean", "all"]


@contextmanager
def representations(
    backbone: Backbone, sites: Sequence[Site], locations: Locations = "mean"
) -> Iterator[dict[str, Tensor]]:
    """While open, each forward pass leaves every site's representations, by name, in what is yielded.

    The mean over locations (B, D), or with "all" each of them (B, L, D); L is 1 at a site without locations.
    """
    found: dict[str, Tensor] = {}

    def keep(site: Site) -> Hook:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            local = as_locations(output, site.layout, site.prefix_tokens)  # (B, L, D)
            # a copy, since the next module may work in place
            found[site.name] = local.mean(1) if locations == "mean" else local.clone()

        return hook

    with hooked((backbone.get_submodule(site.module), keep(site)) for site in sites):
        yield found
