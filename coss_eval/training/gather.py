"""Tensors of all ranks as one batch, with the gradient that one process with the whole batch would have.

Data-parallel training averages gradients over ranks. A loss computed by every rank on the gathered batch is the same
number everywhere, and each rank's own part of it gets its gradient from all ranks' copies: the sum over ranks, which
the average divides by their number, so the gradient that reaches a parameter is that of the single-process loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coss_eval.runtime.processes import rank, world_size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # others may use it too
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def gather(local: Tensor) -> Tensor:
    """(B, ...) of every rank, concatenated in rank order to (world * B, ...), with gradient; itself on one process."""
    if world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return gathered


@torch.no_grad()
def mean_over_ranks(value: Tensor) -> Tensor:
    """The average of equally shaped tensors over ranks, without gradient."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()
