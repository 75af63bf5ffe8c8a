"""Receptive fields: the reference table, propagation against a gradient probe, single operations, Luo's measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from build_networks import build
from gradient_probe import gradient_probe
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models import resnet

from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.backbone import Backbone
from coss_eval.models.rf_resnet import RFResNet
from coss_eval.receptive_field.effective import effective
from coss_eval.receptive_field.picture import draw, field_map
from coss_eval.receptive_field.rules import Field
from coss_eval.receptive_field.theoretical import by_site, fields, theoretical

SITES = ["stem", "stage1", "stage2", "stage3", "stage4"]

# ../shared/reference/redundancy-and-rf.md: after the stem and each stage
TABLE = {
    "resnet18": (zoo.network("resnet18", width=8), [11, 43, 99, 211, 435]),
    "resnet18, cifar": (zoo.network("resnet18", width=8, stem="cifar"), [3, 11, 25, 53, 109]),
    "resnet34": (zoo.network("resnet34", width=8), [11, 59, 179, 547, 899]),
    "resnet34, cifar": (zoo.network("resnet34", width=8, stem="cifar"), [3, 15, 45, 137, 225]),
    "resnet50": (zoo.network("resnet50", width=8), [11, 35, 91, 267, 427]),
    "resnet50, cifar": (zoo.network("resnet50", width=8, stem="cifar"), [3, 9, 23, 67, 107]),
    "resnet50 v1": (RFResNet(50, strides="v1", width=8), [11, 35, 99, 291, 483]),
    "resnet50 v1, cifar": (RFResNet(50, strides="v1", stem="cifar", width=8), [3, 9, 25, 73, 121]),
}

TORCHVISION = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
]  # fmt: skip


def table_of(module: nn.Module, size: int = 96) -> dict[str, tuple[float, int, int]]:
    """(rf, jump, first) by site and by module."""
    table = theoretical(module, size)
    found = {}
    for row in table.itertuples():
        found[row.module] = (row.rf, row.jump, row.first)
        if row.site:
            found[row.site] = found[row.module]
    return found


def middle(rf: float, jump: int, first: int, size: int) -> tuple[int, int]:
    """The pixels that the middle unit sees, cut at the image's edges."""
    low = first + math.ceil(size / jump) // 2 * jump
    return max(low, 0), min(int(low + rf) - 1, size - 1)


@pytest.mark.parametrize("name", TABLE)
def test_the_reference_table(name: str) -> None:
    network, expected = TABLE[name]
    backbone, _ = zoo.wrap(network)
    found = table_of(backbone)
    found["stem"] = found["network.maxpool"]
    assert [found[site][0] for site in SITES] == expected
    assert found["global"][0] == math.inf


def unfilled(name: str) -> Backbone:
    """A torchvision network without memory for its weights, which no receptive field depends on."""
    with torch.device("meta"):
        return build(name, seed=None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_resnet_against_the_gradient_probe(name: str) -> None:
    backbone = unfilled(name)
    found = table_of(backbone)
    size = math.ceil(found["prepool"][0] / 64) * 64 + 64  # the middle unit's field fits in
    probed = gradient_probe(backbone, size)
    assert list(probed) == ["stage1", "stage2", "stage3", "stage4", "prepool"]
    for site, (rows, columns) in probed.items():
        assert rows == columns == middle(*found[site], size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11_bn", "googlenet", "mobilenet_v2", "mnasnet0_5", "densenet121"])
def test_other_convolutional_networks_against_the_gradient_probe(name: str) -> None:
    backbone = unfilled(name)
    rows, columns = gradient_probe(backbone, 512)["prepool"]
    assert rows == columns == middle(*table_of(backbone, 224)["prepool"], 512)


# 3x3 in the first block of each stage only, as in BagNets (Brendel & Bethge 2019), here with ImageNet's stem
@pytest.mark.parametrize(
    ("kept", "rf"), [((1, 1, 0, 0), 27), ((1, 1, 1, 0), 43), ((1, 1, 1, 1), 75), ((0, 0, 0, 0), 11)]
)
def test_bagnet_like_choices_against_the_gradient_probe(kept, rf: int) -> None:
    backbone, _ = zoo.wrap(RFResNet(50, kept=kept, width=8))
    found = table_of(backbone)
    assert found["prepool"][0] == rf
    for site, (rows, columns) in gradient_probe(backbone, 160).items():
        assert rows == columns == middle(*found[site], 160)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options"),
    [("vit_b_32", {"img_size": 64}), ("swin_t", {}), ("mobilenet_v3_small", {}), ("timm:vit_tiny_patch16_224", {})],
)
def test_attention_and_squeeze_and_excite_see_the_whole_image(arch: str, options) -> None:
    backbone, _ = build(arch, **options)
    assert table_of(backbone, backbone.img_size or 64)["prepool"][0] == math.inf


def test_convnext_with_its_permutations_and_linear_layers() -> None:
    assert table_of(build("convnext_tiny")[0], 64)["stage1"] == (4 + 3 * 6 * 4, 4, -36)


class Operation(nn.Module):
    """One function of a map with jump 2 and field 3."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


WHOLE = (math.inf, 32, 0)
weight = torch.ones(8, 8, 3, 3)
OPERATIONS = {
    "nothing": (lambda x: x, (3, 2, -1)),
    "dilated convolution": (lambda x: F.conv2d(x, weight, padding=2, dilation=2), (11, 2, -5)),
    "padding by name": (lambda x: F.conv2d(x, weight, padding="same"), (7, 2, -3)),
    "unpadded convolution": (lambda x: F.conv2d(x, weight), (7, 2, -1)),
    "kernel of one row": (lambda x: F.conv2d(x, weight[:, :, :1], padding=(0, 1)), (7, 2, -1)),
    "zero padding of its own": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), (7, 4, -3)),
    "average pooling": (lambda x: F.avg_pool2d(x, 2), (5, 4, -1)),
    "adaptive pooling to a quarter": (lambda x: F.adaptive_avg_pool2d(x, 4), (9, 8, -1)),
    "adaptive pooling to as many": (lambda x: F.adaptive_avg_pool2d(x, (16, 16)), (3, 2, -1)),
    "residual of two sizes": (lambda x: x + F.conv2d(x, weight, padding=1), (7, 2, -3)),
    "concatenation": (lambda x: torch.cat([F.avg_pool2d(x, 3, 1, 1), x], dim=1), (7, 2, -3)),
    "every second unit": (lambda x: x[:, :, ::2, ::2], (3, 4, -1)),
    "from the third unit": (lambda x: x[..., 2:, 2:], (3, 2, 3)),
    "half of the channels": (lambda x: x.chunk(2, dim=1)[0], (3, 2, -1)),
    "channel shuffle": (lambda x: x.view(1, 2, 4, 16, 16).transpose(1, 2).reshape(x.shape), (3, 2, -1)),
    "channels last": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)), (3, 2, -1)),
    "sequence": (lambda x: F.linear(x.flatten(2).transpose(1, 2), torch.ones(5, 8)), (3, 2, -1)),
    "sequence and back": (lambda x: x.flatten(2).relu().unflatten(2, (16, 16)), WHOLE),
    "mean over channels": (lambda x: x.mean(dim=1), (3, 2, -1)),
    "softmax over channels": (lambda x: x.softmax(dim=1), (3, 2, -1)),
    "softmax over rows": (lambda x: x.softmax(dim=2), WHOLE),
    "global mean": (lambda x: x.mean(dim=(2, 3)), WHOLE),
    "gate": (lambda x: x * x.mean(dim=(2, 3), keepdim=True).sigmoid(), WHOLE),
    "flattened": (lambda x: F.linear(x.flatten(1), torch.ones(5, 8 * 256)), WHOLE),
    "linear over columns": (lambda x: F.linear(x, torch.ones(5, 16)), WHOLE),
    "norm over the map": (lambda x: F.layer_norm(x, (8, 16, 16)), WHOLE),
    "group norm": (lambda x: F.group_norm(x, 2), WHOLE),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), WHOLE),
    "windows": (lambda x: x.view(1, 8, 4, 4, 4, 4).transpose(3, 4), WHOLE),
    "grids that differ": (lambda x: x[:, :, ::2, ::2] + F.conv2d(x, weight)[:, :, :8, :8], WHOLE),
    "larger of two maps": (lambda x: torch.max(x, F.conv2d(x, weight, padding=1)), (7, 2, -3)),
    "in place": (lambda x: F.relu(x, inplace=True).add_(F.conv2d(x, weight, padding=1)), (7, 2, -3)),
    "control flow": (lambda x: F.avg_pool2d(x, 2) if x.mean() < 1e9 else x, (5, 4, -1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_each_operation_does(name: str) -> None:
    function, expected = OPERATIONS[name]
    assert table_of(Operation(function), 32)[""] == expected


def test_rows_and_columns_are_kept_apart() -> None:
    _, reach = fields(nn.Conv2d(3, 4, (1, 7), padding=(0, 3)), 32)[""]
    assert isinstance(reach, Field)
    assert (reach.rows.size, reach.columns.size) == (1, 7)


def test_an_operation_that_is_not_known_is_named() -> None:
    with pytest.raises(CossError, match="'interpolate'"):
        theoretical(Operation(lambda x: F.interpolate(x, scale_factor=2)), 32)


def test_code_that_cannot_be_followed_is_said() -> None:
    class Scripted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    with pytest.raises(CossError, match="could not be followed"):
        theoretical(Scripted(), 32)


class Convolutions(Backbone):
    """Averaging convolutions in a row."""

    dim = local_dim = 1

    def __init__(self, kernel: int, count: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3 if i == 0 else 1, 1, kernel, padding=kernel // 2, bias=False) for i in range(count)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            nn.init.constant_(layer.weight, 1 / layer.weight.numel())

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))


def test_the_effective_field_of_one_average_is_its_kernel() -> None:
    found = effective(Convolutions(7, 1), [torch.rand(2, 3, 33, 33)])
    assert found.size == 7.0
    assert (found.n, found.site, found.map.shape) == (2, "prepool", (33, 33))
    assert torch.equal(found.map.nonzero().float().mean(dim=0), torch.tensor([16.0, 16.0]))


def test_the_effective_field_of_many_averages_is_luos_gaussian() -> None:
    """n averages of width 3 have variance 2n/3; 4.55 % of a Gaussian's peak is at 2.486 standard deviations."""
    count, side = 12, 61
    found = effective(Convolutions(3, count), [torch.rand(1, 3, side, side)])
    disc = math.sqrt(math.pi) * 2.486 * math.sqrt(2 * count / 3)
    assert found.size == pytest.approx(disc, rel=0.05)
    assert found.size < 2 * count + 1  # the theoretical field


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_the_effective_field_of_networks(arch: str) -> None:
    backbone, _ = build(arch, img_size=64)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together, alone = effective(backbone, [images]), effective(backbone, images.split(1))
    assert torch.allclose(together.map, alone.map, atol=1e-5)
    assert 1 <= together.size <= 64
    assert backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())
    first = effective(backbone, [images], site="stage1")
    assert first.map.max() == 1


def test_an_effective_field_of_nothing() -> None:
    backbone = build("resnet18", width=8)[0]
    with pytest.raises(UsageError, match="at least one image"):
        effective(backbone, [])
    with pytest.raises(UsageError, match="did you mean stage4"):
        effective(backbone, [torch.rand(1, 3, 64, 64)], site="stage5")


def test_the_effective_field_is_within_the_theoretical_one() -> None:
    backbone, _ = zoo.wrap(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]))
    found = effective(backbone, [torch.rand(2, 3, 224, 224)], site="stage1")
    rf, jump, first = table_of(backbone)["stage1"]
    low, high = middle(rf, jump, first, 224)
    inside = found.map[low : high + 1, low : high + 1]
    assert found.map.sum() == pytest.approx(inside.sum())


def test_a_row_a_site() -> None:
    backbone = build("resnet18", stem="cifar", width=16)[0].eval()
    table = by_site(backbone, 32, [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    assert list(table["site"]) == list(backbone.sites)
    rows = theoretical(backbone, 32).set_index("module")
    assert [float(rf) for rf in table["rf"]] == [rows.loc[site.module, "rf"] for site in backbone.sites.values()]
    assert (table["effective"] <= table["rf"]).all()


def test_with_images_an_operation_that_is_not_known_leaves_the_theory_open() -> None:
    class Upsampling(Convolutions):
        def features(self, pixels: Tensor) -> Tensor:
            return F.interpolate(super().features(pixels), scale_factor=2)

    backbone = Upsampling(7, 1)
    with pytest.raises(CossError, match="'interpolate'"):
        by_site(backbone, 32)
    table = by_site(backbone, 32, [torch.rand(2, 3, 32, 32)])
    assert table["rf"].isna().all()
    assert table["effective"][0] == 7.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "says"),
    [
        ("vit_b_32", 100, "network takes no image of 100 px .*--size"),
        ("inception_v3", 32, "network takes no image of 32 px .*--size"),
        ("resnet18", -5, "must be positive, not -5"),
        ("resnet18", 0, "must be positive, not 0"),
    ],
)
def test_a_size_that_cannot_be_is_said(arch: str, size: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        by_site(build(arch)[0], size)


def test_the_former_import_path_still_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"import it from coss_eval\.receptive_field"):
        from coss_eval.models.receptive_field import theoretical as former
    assert former is theoretical


def test_the_map_of_a_kernel_fills_its_box() -> None:
    """7 x 7 averages see 7 x 7 pixels and use them alike; the box is the gradient probe's, cut at the edges."""
    seen = field_map(Convolutions(7, 1), [torch.rand(2, 3, 33, 33)])
    assert seen.box == (13, 19, 13, 19)
    rows, columns = np.nonzero(seen.map)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == seen.box
    assert (seen.map.max(), seen.size, seen.n) == (1, 7, 2)
    assert field_map(Convolutions(7, 9), [torch.rand(1, 3, 16, 16)]).box == (0, 15, 0, 15)


def test_the_box_holds_the_map_of_every_site() -> None:
    backbone = zoo.wrap(RFResNet(18, kept=(1, 1, 0, 0), stem="cifar", width=4))[0].eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    probed = gradient_probe(backbone, 64)
    for site in ("stage1", "stage2", "prepool"):
        seen = field_map(backbone, [images], site=site)
        assert seen.box == (*probed[site][0], *probed[site][1])
        top, bottom, left, right = seen.box
        assert seen.map.sum() == pytest.approx(seen.map[top : bottom + 1, left : right + 1].sum())


def test_the_picture_shows_the_map_and_its_box() -> None:
    seen = field_map(Convolutions(7, 1), [torch.rand(1, 3, 33, 33)])
    axis = draw(seen, Figure().subplots())
    np.testing.assert_allclose(axis.images[0].get_array(), np.sqrt(seen.map))
    (box,) = axis.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((12.5, 12.5), 7, 7)
    assert not draw(seen._replace(box=None), Figure().subplots()).patches


def test_a_map_without_a_theory_has_no_box() -> None:
    class Doubled(Convolutions):
        def features(self, pixels: Tensor) -> Tensor:
            return F.interpolate(self.layers(pixels), scale_factor=2)

    assert field_map(Doubled(3, 1), [torch.rand(1, 3, 16, 16)]).box is None
    with pytest.raises(UsageError, match="stage9"):
        field_map(Convolutions(3, 1), [torch.rand(1, 3, 16, 16)], site="stage9")
