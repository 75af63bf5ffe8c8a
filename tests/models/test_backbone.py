"""The contract of a Backbone: layouts as locations, and sites that a forward pass really reaches, in their order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coss_eval.models.backbone import Backbone, MapLayout, as_locations


class TwoStages(Backbone):
    """The smallest backbone with stages: a convolution each."""

    dim = local_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 5, 1)

    def features(self, pixels: Tensor) -> Tensor:
        return self.second(self.first(pixels))

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("layout", "shape", "prefix"),
    [("nchw", (2, 5, 3, 4), 0), ("nhwc", (2, 3, 4, 5), 0), ("nlc", (2, 12, 5), 0), ("nlc", (2, 14, 5), 2)],
)
def test_every_layout_becomes_the_same_locations_row_by_row(
    layout: MapLayout, shape: tuple[int, ...], prefix: int
) -> None:
    locations = torch.randn(2, 12, 5)  # (B, L, D)
    grid = locations.unflatten(1, (3, 4))
    given = {
        "nchw": grid.permute(0, 3, 1, 2),
        "nhwc": grid,
        "nlc": torch.cat([torch.zeros(2, prefix, 5), locations], dim=1),
    }[layout]
    assert given.shape == shape
    assert torch.equal(as_locations(given, layout, prefix), locations)


def test_a_vector_is_one_location() -> None:
    assert as_locations(torch.ones(2, 5), "nc").shape == (2, 1, 5)


def test_forward_is_the_global_part_of_represent() -> None:
    backbone, pixels = TwoStages(), torch.randn(2, 3, 8, 8)
    local, global_ = backbone.represent(pixels)
    assert local.shape == (2, 16, 5)
    assert torch.equal(global_, backbone(pixels))
    assert torch.allclose(local.mean(dim=1), global_)


def test_hooks_on_prepool_and_global_reach_what_is_returned() -> None:
    backbone, pixels = TwoStages(), torch.randn(2, 3, 8, 8)
    clean = backbone(pixels)
    with backbone.prepool.register_forward_hook(lambda _m, _args, output: output * 2):
        assert torch.allclose(backbone(pixels), clean * 2)
        assert torch.allclose(backbone.represent(pixels).local.mean(dim=1), clean * 2)
    with backbone.global_.register_forward_hook(lambda _m, _args, output: output + 1):
        assert torch.allclose(backbone(pixels), clean + 1)
    assert torch.equal(backbone(pixels), clean)


def test_sites_end_with_prepool_and_global() -> None:
    assert list(TwoStages().sites) == ["prepool", "global"]
