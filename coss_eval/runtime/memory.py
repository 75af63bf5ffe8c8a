"""The allocator of the CPU's tensors: freed blocks are kept for the next ones, as torch keeps them on a GPU."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep the memory that is freed; False, and nothing is changed, with another allocator.

    Else it gives every block of more than 32 MiB back to the system, and the next one faults its pages in anew: the
    maps of one layer for a batch are larger than that, and a forward pass can take half as long again. The process
    keeps its peak, which grows by a few percent. Whoever sets MALLOC_... or GLIBC_TUNABLES has chosen otherwise.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # macOS, musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
