"""Chunks of a batch: one large piece at a time for torch's own threads, or small ones side by side in Python's threads.

Nearly all corruptions are torch's operations on a whole chunk, which torch spreads over the cores (or runs on an
accelerator). A few call OpenCV or SciPy for one image at a time: on the CPU those run side by side in threads of
Python, each on a chunk of its own from end to end. Pixels do not depend on the number of threads: no sum is split.
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

from coss_eval.runtime.memory import keep_freed_memory

_CPU_CHUNK_PIXELS = 16 * 224 * 224  # six float images of each, more than most corruptions hold, are below 62 MiB
_THREAD_CHUNK_PIXELS = 8 * 224 * 224  # 4 or 16 do as well; with 2, threads wait for each other
_ACCELERATOR_CHUNK_PIXELS = 64 * 224 * 224  # a dozen float images of each are 460 MB


def map_chunks(
    function: Callable[[Tensor, Tensor], Tensor], images: Tensor, keys: Tensor, *, image_by_image: bool = False
) -> Tensor:
    """``function(images, keys)`` on chunks of (B, 3, H, W) and (B, ...) tensors, its results joined in order.

    ``image_by_image`` says that its time goes into calls for single images: on the CPU, chunks then run side by side.
    """
    if not len(images):
        return images.clone()
    on_cpu = images.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    workers = torch.get_num_threads() if on_cpu and image_by_image else 1
    budget = (_THREAD_CHUNK_PIXELS if image_by_image else _CPU_CHUNK_PIXELS) if on_cpu else _ACCELERATOR_CHUNK_PIXELS
    count = math.ceil(len(images) * images.shape[-2] * images.shape[-1] / budget)
    if count > workers:
        count = math.ceil(count / workers) * workers  # all threads end together
    size = math.ceil(len(images) / count)
    with torch.inference_mode(False):  # the caller's mode does not reach other threads, which write into this
        corrupted = torch.empty(images.shape, dtype=images.dtype, device=images.device)

    def fill(start: int) -> None:
        chunk = slice(start, start + size)
        corrupted[chunk] = function(images[chunk].contiguous(), keys[chunk])

    run = _pool(os.getpid(), workers).map if workers > 1 and count > 1 else map
    for _ in run(fill, range(0, len(images), size)):
        pass
    return corrupted


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of which each runs torch's operations on itself alone; one pool a process, since threads do not fork."""
    threads = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # else the thread's first operation asks, and takes what was last set anywhere
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="corruptions", initializer=start)
    for _ in range(workers):
        pool.submit(int)  # a thread starts when work comes and none is idle
    started.wait()
    # The setting is each thread's own, but threads yet to come take the last one made anywhere: put it back.
    torch.set_num_threads(threads)
    return pool
