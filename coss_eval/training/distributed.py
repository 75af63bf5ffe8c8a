"""Several processes under torchrun: one process group, one device each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.memory import keep_freed_memory


@contextmanager
def process_group(device: str | torch.device) -> Iterator[torch.device]:
    """This process's device; under torchrun the processes are joined, and parted again at the end.

    On the CPU the process keeps its freed memory from then on (``keep_freed_memory``).
    """
    own = resolve_device(device)
    if own.type == "cpu":
        keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield own
        return
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()
