"""BatchNorm over the batches of all ranks, on the CPU too, where torch.nn.SyncBatchNorm refuses to work."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coss_eval.runtime.processes import world_size
from coss_eval.training.method import precise


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class CPUSyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d and 2d whose batch statistics are those of all ranks together; equally large batches."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        x = precise(input).transpose(1, -1)  # (N, ..., C)
        axes = tuple(range(x.dim() - 1))
        count = x.shape[:-1].numel() * world_size()
        mean: Tensor = _SumOverRanks.apply(x.sum(axes)) / count  # type: ignore[no-untyped-call]
        variance: Tensor = _SumOverRanks.apply((x - mean).square().sum(axes)) / count  # type: ignore[no-untyped-call]
        self._follow(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        out = (x - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight + self.bias
        return out.transpose(1, -1).to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its BatchNorms over all ranks; itself where there is one rank. It keeps its parameters."""
    if world_size() == 1:
        return module
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for name, child in module.named_children():
        setattr(module, name, _of(child) if isinstance(child, _BatchNorm) else synchronised(child, device))
    return module


def _of(norm: _BatchNorm) -> CPUSyncBatchNorm:
    made = CPUSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    return made.train(norm.training)
