"""Every family taken apart: head(global) is what the network gave, and every site is where it says it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext, resnet

from coss_eval.errors import UsageError
from coss_eval.models.backbone import as_locations
from coss_eval.models.rf_resnet import RFResNet
from coss_eval.models.wrap import wrap

tv = partial(torchvision.models.get_model, weights=None, num_classes=7)
tm = partial(timm.create_model, num_classes=7)

bottlenecks = partial(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], num_classes=7)
timm_vit = partial(tm, "vit_tiny_patch16_224", img_size=64)
small_vit = partial(
    torchvision.models.VisionTransformer,
    image_size=32,
    patch_size=8,
    num_layers=5,
    num_heads=2,
    hidden_dim=16,
    mlp_dim=32,
    num_classes=7,
)


class KuangliuNet(nn.Module):
    """As the well-known CIFAR networks are written: functional pooling, view, and a head named linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.linear = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.avg_pool2d(x, 8)
        return self.linear(x.view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    """Pools in the middle as well, where the network cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.fc = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((2, 3)))


class OwnViT(nn.Module):
    """Class token first, as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.norm(self.block(x))[:, 0])


class Branching(nn.Module):
    """Control flow that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.abs().sum() > 0:
            x = x * 2
        return self.fc(x.mean((2, 3)))


def flat() -> nn.Module:
    """No pooling at all, and no head by name: the output is the representation."""
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(4 * 64, 9))


CONVNEXT_STAGES = [convnext.CNBlockConfig(8 * i, 8 * i + 8 if i < 4 else None, 1) for i in range(1, 5)]

# name: (network, (side of the images, locations, D, D', stages, has a head))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int, int, bool]]] = {
    "resnet18": (partial(tv, "resnet18"), (64, 4, 512, 512, 4, True)),
    "resnet50": (partial(tv, "resnet50"), (32, 1, 2048, 2048, 4, True)),
    "wide": (partial(bottlenecks, width_per_group=128), (64, 4, 2048, 2048, 4, True)),
    "resnext": (partial(bottlenecks, groups=32, width_per_group=4), (64, 4, 2048, 2048, 4, True)),
    "rf-resnet": (
        partial(RFResNet, 18, kept=(4, 4, 1, 0), stem="cifar", width=16, mlp_layers=2, mlp_width=40, num_classes=7),
        (64, 64, 128, 40, 4, True),
    ),
    "convnext": (partial(convnext.ConvNeXt, CONVNEXT_STAGES, num_classes=7), (64, 4, 32, 32, 4, True)),
    "swin": (
        partial(torchvision.models.SwinTransformer, [4, 4], 8, [1] * 4, [1, 1, 2, 2], [4, 4], num_classes=7),
        (64, 4, 64, 64, 4, True),
    ),
    "vit": (small_vit, (32, 16, 16, 16, 4, True)),
    "vit with pre-logits": (partial(small_vit, representation_size=24), (32, 16, 16, 24, 4, True)),
    "mobilenet": (partial(tv, "mobilenet_v3_small"), (64, 4, 576, 1024, 3, True)),
    "shufflenet": (partial(tv, "shufflenet_v2_x0_5"), (64, 4, 1024, 1024, 3, True)),
    "densenet": (
        partial(torchvision.models.DenseNet, 4, (1, 1, 1, 1), num_init_features=8, num_classes=7),
        (64, 4, 8, 8, 3, True),
    ),
    "timm resnet": (partial(tm, "resnet10t"), (64, 4, 512, 512, 4, True)),
    "timm convnext": (partial(tm, "convnext_atto"), (64, 4, 320, 320, 4, True)),
    "timm vit": (partial(timm_vit, depth=4), (64, 16, 192, 192, 4, True)),
    "timm vit of two blocks": (partial(timm_vit, depth=2), (64, 16, 192, 192, 2, True)),
    "timm vit, mean": (partial(timm_vit, depth=4, global_pool="avg"), (64, 16, 192, 192, 4, True)),
    "timm vit with registers": (
        partial(tm, "vit_small_patch14_reg4_dinov2", img_size=56, depth=4),
        (56, 16, 384, 384, 4, True),
    ),
    "timm two heads": (
        partial(tm, "deit_tiny_distilled_patch16_224", img_size=64, depth=4),
        (64, 16, 192, 192, 4, False),
    ),
    "timm swin": (
        partial(tm, "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1)),
        (64, 4, 192, 192, 4, True),
    ),
    "timm layers after pooling": (partial(tm, "mobilenetv3_small_050"), (64, 4, 288, 1024, 4, True)),
    "timm convolution as head": (
        partial(tm, "resnetv2_50", layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), stem_chs=8),
        (64, 4, 32, 32, 4, True),
    ),
    "timm without pooling": (partial(tm, "resnet10t", num_classes=0, global_pool=""), (64, 4, 512, 512, 0, False)),
    "own, functional pooling": (KuangliuNet, (32, 64, 12, 12, 1, True)),
    "own, squeeze and excite": (SqueezeExcite, (32, 64, 8, 8, 0, True)),
    "own vit": (OwnViT, (32, 16, 8, 8, 0, True)),
    "own, not traceable": (Branching, (32, 1, 8, 8, 0, True)),
    "own, no pooling": (flat, (32, 1, 256, 256, 0, True)),
}


def side_of(name: str) -> int:
    return NETWORKS[name][1][0]


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The network, in eval mode, with no weights left at zero, and two images for it."""
    network = NETWORKS[name][0]().eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network, torch.randn(2, 3, side_of(name), side_of(name))


@pytest.mark.parametrize("name", NETWORKS)
def test_head_of_the_global_representation_is_what_the_network_gave(name: str) -> None:
    network, pixels = made(name)
    side, locations, local_dim, dim, stages, has_head = NETWORKS[name][1]
    with torch.no_grad():
        expected = network(pixels)
        backbone, head = wrap(network, name, img_size=side)
        local, global_ = backbone.represent(pixels)
        assert torch.equal(backbone(pixels), global_)
    assert local.shape == (2, locations, local_dim)
    assert global_.shape == (2, dim)
    assert (backbone.local_dim, backbone.dim) == (local_dim, dim)
    assert len(backbone.stage_sites()) == stages
    assert (head is not None) == has_head
    if head is not None:
        assert torch.allclose(head(global_), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_is_reached_in_its_order_with_its_layout(name: str) -> None:
    network, pixels = made(name)
    backbone, _ = wrap(network, name, img_size=side_of(name))
    reached: dict[str, Tensor] = {}
    for site in backbone.sites.values():
        module = backbone.get_submodule(site.module)
        module.register_forward_hook(lambda _m, _args, output, site=site: reached.__setitem__(site.name, output))
    with torch.no_grad():
        local, global_ = backbone.represent(pixels)
    assert list(reached) == list(backbone.sites)
    found = {
        name: as_locations(reached[name], site.layout, site.prefix_tokens) for name, site in backbone.sites.items()
    }
    assert torch.equal(found["prepool"], local)
    assert torch.equal(found["global"][:, 0], global_)
    counts = [len(found[site.name][0]) for site in backbone.stage_sites()]
    assert counts == sorted(counts, reverse=True)  # the resolution never grows
    assert all(round(count**0.5) ** 2 == count for count in counts)  # square grids: no token counted as a place


@pytest.mark.parametrize("name", ["resnet18", "vit", "mobilenet", "timm convolution as head", "own, not traceable"])
def test_wrapping_draws_nothing_and_leaves_mode_and_statistics(name: str) -> None:
    network, _ = made(name)
    network.train()
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    backbone, head = wrap(network, img_size=side_of(name))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert backbone.training
    assert all(module.training for module in backbone.modules())
    kept = [*backbone.state_dict().values(), *(head.state_dict().values() if head else ())]
    assert len(kept) == len(before)
    assert all(any(torch.equal(tensor.flatten(), old.flatten()) for old in before.values()) for tensor in kept)


@pytest.mark.parametrize("name", ["vit", "timm vit", "timm vit with registers"])
def test_mean_pooling_of_patch_tokens_leaves_the_class_token_and_the_head_out(name: str) -> None:
    network, pixels = made(name)
    backbone, head = wrap(network, pooling="mean")
    local, global_ = backbone.represent(pixels)
    assert head is None
    assert torch.allclose(global_, local.mean(dim=1), atol=1e-6)


def test_mean_pooling_is_for_tokens() -> None:
    with pytest.raises(UsageError, match="token sequences"):
        wrap(made("resnet18")[0], pooling="mean")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", None),
        ("vit", 32),
        ("timm vit", 64),
        ("timm convnext", None),
        ("mobilenet", None),
        ("own vit", None),
    ],
)
def test_img_size_is_set_where_the_network_takes_one_size_only(name: str, side: int | None) -> None:
    assert wrap(made(name)[0])[0].img_size == side


def test_the_one_size_of_an_unknown_network_is_found() -> None:
    assert wrap(made("own, functional pooling")[0])[0].img_size == 32


def test_a_network_for_no_common_size_asks_for_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(4 * 11 * 11, 5))
    with pytest.raises(UsageError, match="--img-size"):
        wrap(network)
    assert wrap(network, img_size=44)[0].img_size == 44


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_family() -> None:
    class Doubled(resnet.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network = Doubled(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(pixels)
        backbone, head = wrap(network)
        assert head is None  # its fc does not give the output
        assert torch.allclose(backbone(pixels), expected, atol=1e-6)


@pytest.mark.parametrize("output", [{"x": torch.ones(1, 2)}, (torch.ones(1, 2),)])
def test_a_network_must_return_one_tensor(output: Any) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(UsageError, match="one tensor"):
        wrap(Wrong())


@pytest.mark.parametrize("name", ["resnet18", "timm swin", "mobilenet", "own vit"])
def test_gradients_reach_the_pixels_and_copies_are_independent(name: str) -> None:
    network, pixels = made(name)
    backbone, _ = wrap(network, img_size=side_of(name))
    twin = copy.deepcopy(backbone)
    pixels.requires_grad_()
    backbone(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(pixels), backbone(pixels))
