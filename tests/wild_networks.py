"""Networks as people write them, small; each computes what its kind does, in code of its own."""

from __future__ import annotations

from typing import Any

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
