"""The ResNets made for 32 px: three stages from 16 planes, or four from 64; pre-activation and wide ones too.

He et al., Deep Residual Learning, section 4.2; He et al., Identity Mappings in Deep Residual Networks; Zagoruyko and
Komodakis, Wide Residual Networks. Key names are torchvision's, where it has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from coss_eval.errors import UsageError

Shortcut = Literal["pad", "padend", "conv", "rawconv", "projection"]
"""Where planes or size change: every other pixel with planes of zeros on both sides, or after the others (option A);
a 1x1 convolution of the activated or of the raw input; that with a BatchNorm (option B)."""

_SPEC = re.compile(
    r"cifar_(?P<pre>pre)?resnet(?P<depth>\d+)(?P<bottleneck>b)?(_s(?P<stages>[1-9]\d*(-[1-9]\d*)*))?"
    r"(_w(?P<stem>\d+))?(_x(?P<widen>\d+))?(_(?P<shortcut>[a-z]+))?(?P<bare>_bare)?"
)


@dataclass(frozen=True)
class CifarSpec:
    """``depth`` counts layers, 6 n + 2 for three stages of n basic blocks; ``widen`` multiplies all but the stem.

    ``each``: the blocks of each stage, where they are not alike (3, 4, 6, 3 of a ResNet-34 or 50).
    ``bare``: without the BatchNorm and ReLU that end a pre-activation network, as github.com/kuangliu's is.
    """

    depth: int
    preactivation: bool = False
    bottleneck: bool = False
    stages: int = 3
    stem: int = 16
    widen: int = 1
    shortcut: Shortcut = "pad"
    bare: bool = False
    each: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        left = self.depth - 2 - self._convolutions * sum(self.blocks)
        if min(self.blocks) < 1 or (left and not (left == 2 and self.preactivation)):  # WRN-28-10 is 6 n + 4
            kind = f"{self._convolutions * self.stages} n" if not self.each else f"{self.depth - left - 2}"
            raise UsageError(f"{self.name}: a depth of {self.depth} is not {kind} + 2; give another")
        if self.shortcut not in get_args(Shortcut):
            raise UsageError(f"{self.name}: shortcuts are {', '.join(get_args(Shortcut))}, not {self.shortcut}")

    @property
    def _convolutions(self) -> int:
        return 3 if self.bottleneck else 2

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of each stage. Wide ones count the shortcuts' convolutions as well, which adds two to their depth."""
        return self.each or ((self.depth - 2) // (self._convolutions * self.stages),) * self.stages

    @property
    def name(self) -> str:
        """The name that ``from_name`` reads back."""
        parts = [f"cifar_{'pre' * self.preactivation}resnet{self.depth}{'b' * self.bottleneck}"]
        parts += [f"s{'-'.join(map(str, self.each or (self.stages,)))}"] if self.stages != 3 or self.each else []
        parts += [f"w{self.stem}"] if self.stem != 16 else []
        parts += [f"x{self.widen}"] if self.widen != 1 else []
        parts += [self.shortcut] if self.shortcut != "pad" else []
        return "_".join([*parts, *(["bare"] if self.bare else [])])


def from_name(arch: str) -> CifarSpec | None:
    """The network that "cifar_resnet56", "cifar_preresnet110_rawconv" ... names; None for another kind of name."""
    match = _SPEC.fullmatch(arch)
    if match is None:
        return None
    stages = tuple(map(int, (match["stages"] or "3").split("-")))
    return CifarSpec(
        int(match["depth"]),
        match["pre"] is not None,
        match["bottleneck"] is not None,
        len(stages) if len(stages) > 1 else stages[0],
        int(match["stem"] or 16),
        int(match["widen"] or 1),
        match["shortcut"] or "pad",  # type: ignore[arg-type]  # as it checks
        match["bare"] is not None,
        stages if len(stages) > 1 else (),
    )


class CifarResNet(nn.Module):
    """A 3x3 stem, stages that halve the map but for the first, the mean over locations and a linear classifier."""

    def __init__(self, spec: CifarSpec, num_classes: int = 10) -> None:
        super().__init__()
        self.spec = spec
        self.conv1 = nn.Conv2d(3, spec.stem, 3, padding=1, bias=False)
        if not spec.preactivation:
            self.bn1 = nn.BatchNorm2d(spec.stem)
        inputs = spec.stem
        for stage, count in enumerate(spec.blocks):
            planes = spec.stem * spec.widen * 2**stage
            blocks = []
            for number in range(count):
                block = _PreOrPostBlock(spec, inputs, planes, 2 if stage and not number else 1)
                blocks.append(block)
                inputs = block.outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.width = inputs
        if spec.preactivation and not spec.bare:
            self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, pixels: Tensor) -> Tensor:
        """The map before pooling."""
        x: Tensor = self.conv1(pixels)
        if not self.spec.preactivation:
            x = F.relu(self.bn1(x))
        for stage in range(self.spec.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return F.relu(self.bn(x)) if self.spec.preactivation and not self.spec.bare else x

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(pixels).mean((2, 3)))
        return logits


class _PreOrPostBlock(nn.Module):
    def __init__(self, spec: CifarSpec, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.spec, self.stride = spec, stride
        self.outputs = planes * (4 if spec.bottleneck else 1)
        widths = [inputs, planes, *([planes] if spec.bottleneck else []), self.outputs]
        sides = [1, 3, 1] if spec.bottleneck else [3, 3]
        self.depth = len(sides)
        for i, side in enumerate(sides):
            step = stride if i == (1 if spec.bottleneck else 0) else 1
            conv = nn.Conv2d(widths[i], widths[i + 1], side, step, side // 2, bias=False)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + int(not spec.preactivation)]))
        self.changes = stride > 1 or inputs != self.outputs
        if self.changes and spec.shortcut in ("conv", "rawconv", "projection"):
            layers: list[nn.Module] = [nn.Conv2d(inputs, self.outputs, 1, stride, bias=False)]
            layers += [nn.BatchNorm2d(self.outputs)] if spec.shortcut == "projection" else []
            self.downsample = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        convs = [self.get_submodule(f"conv{i + 1}") for i in range(self.depth)]
        norms = [self.get_submodule(f"bn{i + 1}") for i in range(self.depth)]
        if not self.spec.preactivation:
            y = x
            for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
                y = norm(conv(y))
                y = F.relu(y) if i + 1 < self.depth else y
            return F.relu(y + self._shortcut(x, x))
        y = activated = F.relu(norms[0](x))
        for i, conv in enumerate(convs):
            y = conv(y if i == 0 else F.relu(norms[i](y)))
        summed: Tensor = y + self._shortcut(x, activated)
        return summed

    def _shortcut(self, x: Tensor, activated: Tensor) -> Tensor:
        if not self.changes:
            return x
        if hasattr(self, "downsample"):
            projected: Tensor = self.downsample(activated if self.spec.shortcut == "conv" else x)
            return projected
        missing = self.outputs - x.shape[1]
        before = missing // 2 if self.spec.shortcut == "pad" else 0
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, missing - before))
