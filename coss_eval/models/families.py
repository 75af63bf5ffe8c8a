"""One Backbone for each known family: where its map ends, how it is pooled, which modules end its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, MapLayout, Site, as_locations
from coss_eval.models.choices import Pooling, Stem
from coss_eval.models.cifar_resnet import CifarResNet

T = TypeVar("T")


class ResNetBackbone(Backbone):
    """torchvision's ResNet, ResNeXt and Wide ResNet, and RFResNet, whose MLP follows the pooling."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.local_dim = network.inplanes
        self.dim = getattr(network, "mlp_width", None) or network.inplanes

    def features(self, pixels: Tensor) -> Tensor:
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        features: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return features

    def pool(self, features: Tensor) -> Tensor:
        pooled = self.network.avgpool(features).flatten(1)
        global_: Tensor = self.network.mlp(pooled) if hasattr(self.network, "mlp") else pooled
        return global_

    def stage_sites(self) -> tuple[Site, ...]:
        return tuple(Site(f"stage{i}", f"network.layer{i}", "nchw") for i in range(1, 5))


class CifarResNetBackbone(Backbone):
    """The three-stage ResNets for 32 px."""

    def __init__(self, network: CifarResNet) -> None:
        super().__init__()
        self.network = network
        self.local_dim = self.dim = network.width

    def features(self, pixels: Tensor) -> Tensor:
        return self.network.features(pixels)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))

    def stage_sites(self) -> tuple[Site, ...]:
        return _stages([f"network.layer{i + 1}" for i in range(self.network.spec.stages)], "nchw")


class PixelsBackbone(Backbone):
    """No network at all: the normalised pixels themselves, the baseline that a representation has to beat."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.img_size = side
        self.local_dim, self.dim = 3, 3 * side**2

    def features(self, pixels: Tensor) -> Tensor:
        return pixels

    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)


class ConvNeXtBackbone(Backbone):
    """torchvision's ConvNeXt; its global representation is the layer-normalised mean of the map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.local_dim = self.dim = network.classifier[0].normalized_shape[0]

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network.features(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        norm, flatten = self.network.classifier[:2]
        pooled: Tensor = flatten(norm(self.network.avgpool(features)))
        return pooled

    def stage_sites(self) -> tuple[Site, ...]:
        return _every_other("network.features", len(self.network.features), "nchw")


class SwinBackbone(Backbone):
    """torchvision's Swin Transformer (v1 and v2): channels stand last inside, first in the map before pooling."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.local_dim = self.dim = network.norm.normalized_shape[0]

    def features(self, pixels: Tensor) -> Tensor:
        net = self.network
        features: Tensor = net.permute(net.norm(net.features(pixels)))
        return features

    def pool(self, features: Tensor) -> Tensor:
        pooled: Tensor = self.network.flatten(self.network.avgpool(features))
        return pooled

    def stage_sites(self) -> tuple[Site, ...]:
        return _every_other("network.features", len(self.network.features), "nhwc")


class ViTBackbone(Backbone):
    """torchvision's VisionTransformer: the class token, after the last layer norm, is the global representation."""

    prepool_layout: MapLayout = "nlc"
    prefix_tokens = 1

    def __init__(self, network: Any, pooling: Pooling = "own") -> None:
        super().__init__()
        self.network, self.pooling = network, pooling
        self.img_size = network.image_size
        self.local_dim = network.hidden_dim
        self.dim = network.hidden_dim if pooling == "mean" else network.representation_size or network.hidden_dim

    def features(self, pixels: Tensor) -> Tensor:
        net = self.network
        patches = net._process_input(pixels)  # (B, L, D)
        token = net.class_token.expand(patches.shape[0], -1, -1)
        features: Tensor = net.encoder(torch.cat([token, patches], dim=1))
        return features

    def pool(self, features: Tensor) -> Tensor:
        if self.pooling == "mean":
            return features[:, self.prefix_tokens :].mean(dim=1)
        pooled: Tensor = self.network.heads(features[:, 0])
        return pooled

    def stage_sites(self) -> tuple[Site, ...]:
        blocks = [f"network.encoder.layers.{name}" for name, _ in self.network.encoder.layers.named_children()]
        return _stages(four_groups(blocks), "nlc", self.prefix_tokens)


class TimmBackbone(Backbone):
    """Any timm network of today's interface: forward_features, forward_head, feature_info.

    ``features`` is the output of forward_features on an example; it settles layout and dimensions.
    """

    def __init__(self, network: Any, features: Tensor, sites: tuple[Site, ...], pooling: Pooling = "own") -> None:
        super().__init__()
        self.network, self.pooling = network, pooling
        self.prefix_tokens = getattr(network, "num_prefix_tokens", 0) if features.ndim == 3 else 0
        self.prepool_layout = layout_of(features, network.num_features)
        self._sites = sites
        self.local_dim = as_locations(features, self.prepool_layout).shape[-1]
        with torch.no_grad():
            self.dim = self.pool(features).shape[-1]

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(pixels)
        return features

    def pool(self, features: Tensor) -> Tensor:
        if self.pooling == "mean":
            return as_locations(features, self.prepool_layout, self.prefix_tokens).mean(dim=1)
        pooled: Tensor = self.network.forward_head(features, pre_logits=True)
        return pooled

    def stage_sites(self) -> tuple[Site, ...]:
        return self._sites


def layout_of(output: Tensor, channels: int) -> MapLayout:
    """How a map or sequence of so many channels lies in memory order, told from its shape."""
    if output.ndim == 3:
        return "nlc"
    return "nchw" if output.shape[1] == channels else "nhwc"


def four_groups(blocks: Sequence[T]) -> list[T]:
    """The last block of each of four equal groups (of fewer where there are fewer blocks)."""
    groups = min(4, len(blocks))
    return [blocks[(i + 1) * len(blocks) // groups - 1] for i in range(groups)]


def _every_other(container: str, length: int, layout: MapLayout) -> tuple[Site, ...]:
    """Stages of a Sequential that alternates stem or down-sampling with a stage, as ConvNeXt's and Swin's do."""
    return _stages([f"{container}.{i}" for i in range(1, length, 2)], layout)


def _stages(modules: Sequence[str], layout: MapLayout, prefix_tokens: int = 0) -> tuple[Site, ...]:
    return tuple(Site(f"stage{i}", module, layout, prefix_tokens) for i, module in enumerate(modules, start=1))


def has_resnet_stem(network: nn.Module) -> bool:
    """Whether a network begins as a ResNet does: one convolution, and a max-pool further on."""
    return isinstance(getattr(network, "conv1", None), nn.Conv2d) and hasattr(network, "maxpool")


def use_cifar_stem(network: Any, stem: Stem) -> None:
    """Give a ResNet a 3x3 stride-1 first convolution and no max-pool, for images of some 32 px.

    "solo-cifar" pads it by 2, as solo-learn has it (no weight's shape tells), "lightly-cifar" leaves the ReLU out.
    """
    if not has_resnet_stem(network):
        raise UsageError(f"stem {stem!r} is for ResNets, not for {type(network).__name__}; leave --stem out")
    first, padding = network.conv1, 2 if stem == "solo-cifar" else 1
    network.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=padding, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    if stem == "lightly-cifar":
        network.relu = nn.Identity()  # the only one outside the blocks
