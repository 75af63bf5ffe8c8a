"""Chunks of a batch, side by side: threads on the CPU, one large piece at a time on an accelerator.

On the CPU each chunk runs on one thread from end to end. So its temporaries stay in that core's cache, and no sum is
split differently when the number of threads changes: the pixels do not depend on it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

# Four images of 224 px, or 196 of 32 px: enough work for each call of torch, and temporaries that stay in the cache.
_CPU_CHUNK_PIXELS = 4 * 224 * 224
# 64 images of 224 px; a dozen float images of this size are 460 MB.
_ACCELERATOR_CHUNK_PIXELS = 64 * 224 * 224


def map_chunks(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, keys: Tensor) -> Tensor:
    """``function(images, keys)`` on chunks of (B, 3, H, W) and (B, ...) tensors, its results joined in order."""
    if not len(images):
        return images.clone()
    on_cpu = images.device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else 1
    budget = _CPU_CHUNK_PIXELS if on_cpu else _ACCELERATOR_CHUNK_PIXELS
    size = max(1, min(budget // (images.shape[-2] * images.shape[-1]), math.ceil(len(images) / workers)))
    starts = range(0, len(images), size)
    chunks = [(images[start : start + size], keys[start : start + size]) for start in starts]
    run = _pool(os.getpid(), workers).map if on_cpu else map
    return torch.cat(list(run(lambda chunk: function(*chunk), chunks)))


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of which each runs torch's operations on itself alone; one pool a process, since threads do not fork."""
    threads = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="corruptions", initializer=start)
    for _ in range(workers):
        pool.submit(int)  # a thread starts when work comes and none is idle
    started.wait()
    # The setting is each thread's own, but threads yet to come take the last one made anywhere: put it back.
    torch.set_num_threads(threads)
    return pool
