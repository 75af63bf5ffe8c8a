"""Memory: the allocator of the CPU's tensors, what a failure to get some looks like, and what gradients need."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep the memory that is freed; False, and nothing is changed, with another allocator.

    Else it gives every block of more than 32 MiB back to the system, and the next one faults its pages in anew: the
    maps of one layer for a batch are larger than that, and a forward pass can take half as long again. The process
    keeps its peak, which grows by a few percent. Whoever sets MALLOC_... or GLIBC_TUNABLES has chosen otherwise.

    Where memory is rationed, what is kept is missed when it runs out: blocks in use pin the heap at its full size, and
    oneDNN's code, a map, finds no room. From then on oneDNN fails in that thread, however small the batch.
    """
    if _set_up_by_hand() or _rationed():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # macOS, musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def _set_up_by_hand() -> bool:
    """Whether a person has said how glibc's allocator is to work."""
    return "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)


def _rationed() -> bool:
    """Whether what this process maps is counted, used or not: by ulimit -d and -v, by a kernel without overcommit."""
    import resource

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    return any(limit != resource.RLIM_INFINITY for limit in limits) or (
        overcommit.exists() and overcommit.read_text().strip() == "2"
    )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one that led to it, says that memory has run out, on either device.

    Only some are a MemoryError, as NumPy's are; torch and the libraries below it have no class for it but words.
    """
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


NO_CODE = "could not create a primitive"
"""oneDNN's, of its buffers and of a layer's code; where there was no room for code, its thread gets none any more."""
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "Cannot allocate memory",  # the system's, of a map or a fork
    "bad_alloc",
    NO_CODE,
    "Insufficient memory",  # OpenCV's
    "can't start new thread",  # whose stack finds no room
)


def give_memory_back(device: torch.device) -> None:
    """What is kept of freed memory, to the device or the system: blocks of another size may be asked for next.

    On a CPU so may maps (a thread's stack, oneDNN's code), which get nothing of what the allocator keeps. From then on
    it maps large blocks by themselves, each of which is given back when it is freed; not where it was set up by hand.
    """
    import torch

    gc.collect()  # a traceback that is part of a circle holds what the failed pass made
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(AttributeError):  # macOS, musl
        libc = ctypes.CDLL(None)
        if device.type == "cpu" and not _set_up_by_hand():
            for option, value in ((_M_MMAP_MAX, 2**16), (_M_MMAP_THRESHOLD, 2**20), (_M_TRIM_THRESHOLD, 2**17)):
                libc.mallopt(option, value)
        libc.malloc_trim(0)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for circles of garbage seldom for a while: where most of what is made lives on, looking finds little.

    A report makes a million objects, of records and of figures, and an eighth of its time was Python's looking at them.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(before[0], 50_000), *before[1:])  # 0: never, by whoever set it
    try:
        yield
    finally:
        gc.set_threshold(*before)


def most_resident() -> int:
    """Bytes that this process had in memory at most.

    Linux's getrusage counts what its parent had when it started it, too; /proc/self/status does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def bytes_for_gradients(forward: Callable[[], Any]) -> int:
    """Bytes of all that a forward pass keeps for the backward pass, parameters left out; a block is counted once."""
    import torch

    blocks: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            blocks[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output itself would be kept by the graph that it keeps, for ever

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = forward()  # held until it is counted, else freed blocks would be taken for one another
        del kept
    return sum(blocks.values())
