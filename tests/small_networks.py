"""Small real Backbones of every layout: residual CNNs, one with an MLP after pooling, and transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coss_eval.models.backbone import Backbone, Site


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.skip(x))


class Convolutional(Backbone):
    """Two residual stages on 16 px: an 8 x 8 and a 4 x 4 map; optionally an MLP after pooling, as in an RF-ResNet."""

    def __init__(self, mlp: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU())
        self.layer1, self.layer2 = Residual(8, 12, 2), Residual(12, 16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10)) if mlp else nn.Identity()

    def stage_sites(self) -> tuple[Site, ...]:
        return Site("stage1", "layer1", "nchw"), Site("stage2", "layer2", "nchw")

    def features(self, pixels: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(pixels)))

    def pool(self, features: Tensor) -> Tensor:
        return self.mlp(features.mean((2, 3)))


class Mixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Tokens(Backbone):
    """A two-block transformer on 16 patches of 16 px, pooled by its class token or by the mean of its patches."""

    prepool_layout = "nlc"

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.prefix_tokens = int(class_token)
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.positions = nn.Parameter(torch.zeros(1, 16, 12))
        self.token = nn.Parameter(torch.zeros(1, 1, 12)) if class_token else None
        self.block1, self.block2 = Mixer(12), Mixer(12)

    def stage_sites(self) -> tuple[Site, ...]:
        return tuple(Site(f"stage{i}", f"block{i}", "nlc", self.prefix_tokens) for i in (1, 2))

    def features(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.block2(self.block1(x))

    def pool(self, features: Tensor) -> Tensor:
        return features[:, 0] if self.token is not None else features.mean(1)


class ChannelsLast(Convolutional):
    """The same network with (B, H, W, C) maps from the first stage on, as in a Swin."""

    prepool_layout = "nhwc"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Permuted(self.layer1, False), Permuted(self.layer2, True)

    def stage_sites(self) -> tuple[Site, ...]:
        return Site("stage1", "first", "nhwc"), Site("stage2", "second", "nhwc")

    def features(self, pixels: Tensor) -> Tensor:
        return self.second(self.first(self.stem(pixels)))

    def pool(self, features: Tensor) -> Tensor:
        return features.mean((1, 2))


class Permuted(nn.Module):
    def __init__(self, stage: nn.Module, incoming: bool) -> None:
        super().__init__()
        self.stage, self.incoming = stage, incoming

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x.permute(0, 3, 1, 2) if self.incoming else x).permute(0, 2, 3, 1)


class Untraceable(Convolutional):
    """A forward pass that branches on its values, which no tracer can follow."""

    def features(self, pixels: Tensor) -> Tensor:
        x = self.layer1(self.stem(pixels))
        return self.layer2(x if float(x.detach().sum()) > -1e30 else -x)


FAMILIES = {
    "cnn": Convolutional,
    "cnn+mlp": lambda: Convolutional(mlp=True),
    "nhwc": ChannelsLast,
    "class token": lambda: Tokens(class_token=True),
    "mean tokens": lambda: Tokens(class_token=False),
}


def network(family: str, seed: int = 0) -> Backbone:
    """A network of FAMILIES in eval mode, its weights and its normalisations' statistics random from the seed."""
    backbone = FAMILIES[family]()
    scramble(backbone, seed)
    return backbone.eval()


def scramble(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + (0.0 if tensor.dim() > 1 else 0.5))


def pixels(n: int, seed: int = 0, size: int = 16) -> Tensor:
    """Smooth random images: neighbouring pixels agree, as in photographs."""
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
