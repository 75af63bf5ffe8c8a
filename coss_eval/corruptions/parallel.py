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

# Eight images of 224 px, or 392 of 32 px. Smaller, and threads wait for each other more than they work (between two
# calls of torch only one of them runs); larger, and temporaries leave the cache.
_CPU_CHUNK_PIXELS = 8 * 224 * 224
# 64 images of 224 px; a dozen float images of this size are 460 MB.
_ACCELERATOR_CHUNK_PIXELS = 64 * 224 * 224


def map_chunks(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, keys: Tensor) -> Tensor:
    """``function(images, keys)`` on chunks of (B, 3, H, W) and (B, ...) tensors, its results joined in order."""
    if not len(images):
        return images.clone()
    on_cpu = images.device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else 1
    budget = _CPU_CHUNK_PIXELS if on_cpu else _ACCELERATOR_CHUNK_PIXELS
    count = math.ceil(len(images) * images.shape[-2] * images.shape[-1] / budget)
    if count > workers:
        count = math.ceil(count / workers) * workers  # all threads end together
    size = math.ceil(len(images) / count)
    with torch.inference_mode(False):  # the caller's mode does not reach other threads, which write into this
        corrupted = torch.empty(images.shape, dtype=images.dtype, device=images.device)

    def fill(start: int) -> None:
        # Each thread puts its own in place: torch would join them with threads that then spin beside ours.
        chunk = slice(start, start + size)
        corrupted[chunk] = function(images[chunk].contiguous(), keys[chunk])

    run = _pool(os.getpid(), workers).map if on_cpu else map
    for _ in run(fill, range(0, len(images), size)):
        pass
    return corrupted


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of which each runs torch's operations on itself alone; one pool a process, since threads do not fork."""
    # glibc gives large blocks back to the system when they are freed, so that every temporary would fault its pages in
    # anew (several times slower on a bad day). "Large" grows to the largest block given back so far: so give one back.
    torch.empty(31 * 2**20, dtype=torch.uint8)
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
