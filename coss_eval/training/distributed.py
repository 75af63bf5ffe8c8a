"""Several processes under torchrun: one process group, one device each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from coss_eval.probes.forward import resolve_device


@contextmanager
def process_group(device: str | torch.device) -> Iterator[torch.device]:
    """This process's device; under torchrun the processes are joined, and parted again at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield resolve_device(device)
        return
    own = resolve_device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()
