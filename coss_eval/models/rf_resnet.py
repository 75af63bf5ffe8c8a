"""RF-ResNets: ResNets whose local representations see a bounded, chosen part of the image (CO-SSL, arXiv 2501.02860).

Some 3x3 convolutions become 1x1, as in BagNets, and an MLP follows the average pooling. The paper does not say which
3x3 are kept, where the strides stand, or the MLP's shape: all of them are fields here, and no exact reproduction is
claimed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.choices import Stem
from coss_eval.models.families import use_cifar_stem

Strides = Literal["torchvision", "v1"]
Kept = tuple[int, int, int, int]

BLOCKS: dict[int, tuple[Any, Kept]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class RFResNet(ResNet):  # type: ignore[misc]
    """A torchvision ResNet (same key names) with a choice of 3x3 convolutions, strides, width and an MLP after pooling.

    ``kept``: in each stage, how many 3x3 stay, counted from the stage's first (None: all); the rest become 1x1.
    ``strides``: "torchvision" (in a bottleneck's 3x3) or "v1" (in its first 1x1, as He et al. 2015 and BagNet).
    ``width``: planes of the first stage; the later ones double it. ``mlp_layers`` linear layers with biases,
    ReLU between them, map the mean of the locals to the global representation (B, mlp_width), through
    ``mlp_width`` units each (None: as many as there are channels).
    """

    def __init__(
        self,
        depth: int,
        *,
        kept: Kept | None = None,
        stem: Stem = "imagenet",
        strides: Strides = "torchvision",
        width: int = 64,
        mlp_layers: int = 0,
        mlp_width: int | None = None,
        num_classes: int = 1000,
    ) -> None:
        _check(depth, kept, stem, strides)
        for name, value, least in (("width", width, 1), ("mlp_layers", mlp_layers, 0), ("mlp_width", mlp_width, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name} of an RF-ResNet must be {least} or more, not {value}")
        block, blocks = _blocks(depth)
        super().__init__(block, blocks, num_classes=num_classes)
        if width != 64:
            self._set_width(width, block, blocks)
        if strides == "v1":
            self._stride_first()
        if kept is not None:
            self._keep(kept)
        if stem != "imagenet":
            use_cifar_stem(self, stem)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.mlp_width = (mlp_width or self.inplanes) if mlp_layers else self.inplanes
        self.mlp = _mlp(self.inplanes, self.mlp_width, mlp_layers)
        self.fc = nn.Linear(self.mlp_width, num_classes)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.mlp(self.avgpool(x).flatten(1)))
        return logits

    def _set_width(self, width: int, block: Any, blocks: Kept) -> None:
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, count in enumerate(blocks):
            setattr(self, f"layer{i + 1}", self._make_layer(block, width * 2**i, count, stride=2 if i else 1))

    def _stride_first(self) -> None:
        for stage in (self.layer2, self.layer3, self.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)

    def _keep(self, kept: Kept) -> None:
        for i, keep in enumerate(kept, start=1):
            for block, name in list(_spatial(getattr(self, f"layer{i}")))[keep:]:
                old = getattr(block, name)
                setattr(block, name, nn.Conv2d(old.in_channels, old.out_channels, 1, old.stride, bias=False))


def _blocks(depth: int) -> tuple[Any, Kept]:
    if depth not in BLOCKS:
        raise UsageError(f"no ResNet of depth {depth}; known: {', '.join(map(str, BLOCKS))}")
    return BLOCKS[depth]


def _check(depth: int, kept: Kept | None, stem: Stem, strides: Strides) -> None:
    """UsageError for a layout that no ResNet of this depth can have."""
    counts = _spatial_counts(depth)
    if stem not in get_args(Stem):
        raise unknown_name("stem", stem, get_args(Stem))
    if strides not in get_args(Strides):
        raise unknown_name("strides", strides, get_args(Strides))
    if strides == "v1" and BLOCKS[depth][0] is not Bottleneck:
        raise UsageError("strides='v1' is for bottleneck networks (depth 50 and more); leave it at 'torchvision'")
    if kept is not None and len(kept) != len(counts):
        raise UsageError(f"kept must be {len(counts)} counts, one a stage, not {kept}")
    for i, (keep, count) in enumerate(zip(kept or counts, counts, strict=True), start=1):
        if not 0 <= keep <= count:
            raise UsageError(f"stage {i} has {count} 3x3 convolutions; cannot keep {keep} of them")


def _spatial(stage: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The 3x3 convolutions of a stage, first to last, each by its block and attribute."""
    for block in stage.children():
        for name, child in block.named_children():
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                yield block, name


def _mlp(inputs: int, width: int, layers: int) -> nn.Sequential:
    mlp = nn.Sequential()
    for i in range(layers):
        if i:
            mlp.append(nn.ReLU(inplace=True))
        mlp.append(nn.Linear(inputs if i == 0 else width, width))
    return mlp


def rf_of(depth: int, kept: Kept | None = None, *, stem: Stem = "imagenet", strides: Strides = "torchvision") -> int:
    """The theoretical receptive field of the local representations, in pixels; ``kept`` as in RFResNet.

    Each kept 3x3 adds two jumps, the jump being that of the map it reads: in torchvision's layout a stage's first one
    reads the map before it is halved.
    """
    _check(depth, kept, stem, strides)
    size, jump = (11, 4) if stem == "imagenet" else (3, 1)
    for i, keep in enumerate(kept or _spatial_counts(depth)):
        before, jump = jump, jump * 2 if i else jump
        size += 2 * (before if strides == "torchvision" else jump) * min(keep, 1) + 2 * jump * max(keep - 1, 0)
    return size


def reachable(depth: int, *, stem: Stem = "imagenet", strides: Strides = "torchvision") -> dict[int, Kept]:
    """Every receptive field that keeping each stage's first 3x3s can give, each with its smallest network.

    A 3x3 costs four times as much in every further stage, so the smallest keeps its 3x3s early.
    """
    counts = _spatial_counts(depth)
    choices: list[Kept] = [(a, b, c, d) for a, b, c, d in product(*(range(count + 1) for count in counts))]
    sizes: dict[int, Kept] = {}
    for kept in sorted(choices, key=lambda kept: sum(4**i * keep for i, keep in enumerate(kept))):
        sizes.setdefault(rf_of(depth, kept, stem=stem, strides=strides), kept)
    return dict(sorted(sizes.items()))


def rf_resnet(
    depth: int, rf: int, *, stem: Stem = "imagenet", strides: Strides = "torchvision", **fields: Any
) -> RFResNet:
    """The smallest RF-ResNet of this receptive field; ``fields`` (width, mlp_layers, ...) go to RFResNet.

    Raises UsageError, naming the nearest sizes, where no choice of 3x3 gives it.
    """
    sizes = reachable(depth, stem=stem, strides=strides)
    if rf not in sizes:
        near = ", ".join(map(str, sorted(sorted(sizes, key=lambda size: abs(size - rf))[:6])))
        other: Stem = "cifar" if stem == "imagenet" else "imagenet"
        hint = f" (the {other} stem reaches {rf})" if rf in reachable(depth, stem=other, strides=strides) else ""
        raise UsageError(
            f"ResNet-{depth} with the {stem} stem cannot have a receptive field of {rf}; nearest: {near}{hint}"
        )
    return RFResNet(depth, kept=sizes[rf], stem=stem, strides=strides, **fields)


def _spatial_counts(depth: int) -> Kept:
    """How many 3x3 convolutions each stage has: one a bottleneck, two a basic block."""
    block, blocks = _blocks(depth)
    each = 1 if block is Bottleneck else 2
    first, second, third, fourth = (count * each for count in blocks)
    return first, second, third, fourth


@dataclass(frozen=True)
class Preset:
    """A named RF-ResNet, with the fields of RFResNet; ``rf`` is the receptive field of its local representations."""

    rf: int
    depth: int
    kept: Kept
    stem: Stem = "imagenet"
    mlp_layers: int = 2

    def network(self, *, width: int = 64, num_classes: int = 1000) -> RFResNet:
        """The network, or a narrower one with the same receptive field."""
        return RFResNet(
            self.depth,
            kept=self.kept,
            stem=self.stem,
            width=width,
            mlp_layers=self.mlp_layers,
            num_classes=num_classes,
        )


def _ladder(depth: int, stem: Stem, sizes: tuple[int, ...]) -> dict[str, Preset]:
    choices = reachable(depth, stem=stem)
    return {f"rf{rf}_resnet{depth}": Preset(rf, depth, choices[rf], stem) for rf in sizes}


SPEC = re.compile(
    r"rf_resnet(?P<depth>\d+)_k(?P<kept>\d+-\d+-\d+-\d+)(_mlp(?P<layers>\d+)(x(?P<units>\d+))?)?(?P<v1>_v1)?"
)


SIZE = re.compile(r"rf(?P<rf>\d+)_resnet(?P<depth>\d+)")


def is_rf_resnet(arch: str) -> bool:
    """Whether ``from_name`` knows the name."""
    return arch in PRESETS or SIZE.fullmatch(arch) is not None or SPEC.fullmatch(arch) is not None


def from_name(arch: str, *, stem: Stem = "imagenet", width: int = 64, num_classes: int = 1000) -> RFResNet | None:
    """The RF-ResNet of a name, or None where it is no RF-ResNet's.

    A preset's ("rf29_resnet18"; ``stem`` "imagenet" leaves its stem as it is); another size's ("rf107_resnet50", with
    the stem asked for and the presets' MLP); or any other's, spelt out: "rf_resnet34_k6-4-1-0_mlp2x512_v1" keeps 6, 4,
    1 and 0 3x3 convolutions in the stages of a ResNet-34, has an MLP of 2 layers of 512 units (left out: no MLP;
    without x512: as wide as the last stage) and v1's strides.
    """
    if arch in PRESETS:
        preset = PRESETS[arch]
        if stem not in ("imagenet", preset.stem):
            raise UsageError(f"{arch} has the {preset.stem} stem of its own; pass --stem imagenet to leave it so")
        return preset.network(width=width, num_classes=num_classes)
    if size := SIZE.fullmatch(arch):
        fields: dict[str, Any] = {"width": width, "mlp_layers": Preset.mlp_layers, "num_classes": num_classes}
        return rf_resnet(int(size["depth"]), int(size["rf"]), stem=stem, **fields)
    spec = SPEC.fullmatch(arch)
    if spec is None:
        return None
    first, second, third, fourth = map(int, spec["kept"].split("-"))
    return RFResNet(
        int(spec["depth"]),
        kept=(first, second, third, fourth),
        stem=stem,
        strides="v1" if spec["v1"] else "torchvision",
        width=width,
        mlp_layers=int(spec["layers"] or 0),
        mlp_width=int(spec["units"]) if spec["units"] else None,
        num_classes=num_classes,
    )


# The last of each ladder keeps every 3x3: the plain network with the same MLP, the control of an RF ablation.
PRESETS = {
    **_ladder(50, "imagenet", (35, 67, 99, 131, 195, 267, 427)),  # for 224 px; the paper's main one is 99
    **_ladder(18, "cifar", (9, 17, 29, 45, 61, 85, 109)),  # for 64 px; the paper's main one is 29
}
