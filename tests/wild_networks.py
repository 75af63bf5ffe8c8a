"""Networks as people write them, small; each computes what its kind does, in code of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """A block as in CIFAR repositories: ``shortcut`` None pads (option A), else a convolution with a norm (B)."""

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: str | None, *, at_end: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.missing, self.at_end, self.place = stride, planes - inputs, at_end, shortcut
        if shortcut and (stride > 1 or inputs != planes):
            branch = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            self.add_module(shortcut, branch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.place and hasattr(self, self.place):
            x = getattr(self, self.place)(x)
        elif self.missing:
            sides = (0, self.missing) if self.at_end else (self.missing // 2, self.missing // 2)
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *sides))
        return F.relu(y + x)


class CifarNet(nn.Module):
    """Three stages of n blocks from 16 planes; the head is called ``head``."""

    def __init__(self, n: int = 3, shortcut: str | None = None, head: str = "linear", *, at_end: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        inputs = 16
        for stage, planes in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(n):
                blocks.append(Basic(inputs, planes, 2 if stage > 1 and i == 0 else 1, shortcut, at_end=at_end))
                inputs = planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.head = head
        self.add_module(head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size()[3])
        logits: Tensor = getattr(self, self.head)(x.view(x.size(0), -1))
        return logits


class PreAct(nn.Module):
    """``raw``: the shortcut ("downsample") takes the input itself; else ("shortcut") the activated one."""

    def __init__(self, inputs: int, planes: int, stride: int, *, raw: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.raw, self.place = raw, "downsample" if raw else "shortcut"
        if stride > 1 or inputs != planes:
            self.add_module(self.place, nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = getattr(self, self.place)(x if self.raw else out) if hasattr(self, self.place) else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + residual


class PreActNet(nn.Module):
    """Three stages with a norm at the end, or kuangliu's: four stages, wider, and none."""

    def __init__(self, n: int = 2, *, raw: bool = True, four: bool = False) -> None:
        super().__init__()
        inputs = width = 64 if four else 16
        self.stages = 4 if four else 3
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        for stage in range(self.stages):
            planes, blocks = width * 2**stage, []
            for i in range(n):
                blocks.append(PreAct(inputs, planes, 2 if stage and i == 0 else 1, raw=raw))
                inputs = planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if not four:
            self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        logits: Tensor = self.linear(x.mean(3).mean(2))
        return logits


class WideBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, planes, 1, stride, bias=False) if inputs != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        x = x if self.convShortcut is None else self.convShortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideNet(nn.Module):
    """As WRN-10-2 is laid out in the repositories of robust networks."""

    def __init__(self, n: int = 2, widen: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        inputs = 16
        for number, planes in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
            stage = nn.Module()
            blocks = [
                WideBlock(inputs if i == 0 else planes, planes, 2 if number > 1 and i == 0 else 1) for i in range(n)
            ]
            stage.layer = nn.Sequential(*blocks)
            self.add_module(f"block{number}", stage)
            inputs = planes
        self.bn1, self.fc, self.width = nn.BatchNorm2d(inputs), nn.Linear(inputs, 10), inputs

    def forward(self, x: Tensor) -> Tensor:
        stages: list[Any] = [self.block1, self.block2, self.block3]
        x = self.conv1(x)
        for stage in stages:
            x = stage.layer(x)
        logits: Tensor = self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).view(-1, self.width))
        return logits


def _reduce(x: Any) -> Tensor:
    """As einops does: a table of tensor types, KeyError for a tracer's."""
    kind = {Tensor: "torch"}[type(x)]
    mean: Tensor = x.mean((2, 3)) if kind == "torch" else x
    return mean


POOLINGS: dict[str, Callable[[Any], Tensor]] = {
    "a constant": lambda x: F.avg_pool2d(x, 8),
    "x.size()[3]": lambda x: F.avg_pool2d(x, x.size()[3]),
    "x.size()[2:]": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "x.shape[-1]": lambda x: F.avg_pool2d(x, x.shape[-1]),
    "mean(3).mean(2)": lambda x: x.mean(3).mean(2),
    "mean(-1).mean(-1)": lambda x: x.mean(-1).mean(-1),
    "view and mean": lambda x: x.view(x.size(0), x.size(1), -1).mean(2),
    "unpacked shape": lambda x: x.view(*x.shape[:2], -1).mean(2),
    "flatten(2).mean(2)": lambda x: x.flatten(2).mean(2),
    "mean of locations last": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, x.size(1)).mean(1),
    "max of max": lambda x: x.max(3)[0].max(2)[0],
    "GeM": lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(3), (x.size(-2), x.size(-1))).pow(1 / 3),
    "GeM by mean": lambda x: torch.clamp(x, min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
    "einops": _reduce,
    "a branch on values": lambda x: x.mean((2, 3)) if bool(x.isfinite().all()) else x.amax((2, 3)),
    "an int of the shape": lambda x: F.avg_pool2d(x, int(x.shape[2])),
}


class Pools(nn.Module):
    """64 locations of 64 units before a pooling in code; a head called ``linear``."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.conv3 = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.linear, self.pooling = nn.Linear(64, 10), pooling

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))))
        logits: Tensor = self.linear(POOLINGS[self.pooling](x).reshape(x.size(0), -1))
        return logits


class ForOneSide(nn.Module):
    """Takes images of one unusual side alone, as networks with attention over blocks do."""

    def __init__(self, side: int = 256) -> None:
        super().__init__()
        self.side, self.conv, self.head = side, nn.Conv2d(3, 8, 7, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.side
        logits: Tensor = self.head(F.relu(self.conv(x)).mean((2, 3)))
        return logits
