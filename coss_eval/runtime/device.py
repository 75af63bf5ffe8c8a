"""Where a network runs, how exactly, and how long that takes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coss_eval.errors import UsageError
from coss_eval.runtime.live import say


@dataclass(frozen=True)
class Compute:
    """Where networks run, how many images at a time, and whether features and probes are kept in the user's cache.

    ``on_images`` is told how far a pass is: (what it is, images done, images in all). ``held`` has the last arrays, by
    their name in the cache, that are too large for it: mapped, and there for as long as this is. No number depends on
    any of it beyond rounding.
    """

    device: torch.device
    batch_size: int = 256
    cache: bool = True
    on_images: Callable[[str, int, int], None] | None = field(default=None, compare=False)
    held: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)


def device_names(device: str) -> list[str]:
    """The devices that a word names, one a process: "cuda:0,1" is cuda:0 and cuda:1, "cpu,cpu" the CPU twice.

    >>> device_names("cuda:0,1,cuda:3"), device_names("cpu,cpu"), device_names("auto")
    (['cuda:0', 'cuda:1', 'cuda:3'], ['cpu', 'cpu'], ['auto'])
    """
    names: list[str] = []
    for word in map(str.strip, device.split(",")):
        kind = names[-1].partition(":")[0] if names else ""
        names.append(f"{kind}:{word}" if word.isdecimal() else word)
    return names


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the GPU where CUDA has one, else the CPU; any other name is checked to be there."""
    if len(device_names(str(device))) > 1:
        raise UsageError(
            f"device {str(device)!r} names several devices: this takes one, as evaluations alone take more"
        )
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # as a tensor there says it, which is "cuda:0" for "cuda"
        resolved = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used here ({reason}); try auto or cpu") from error
    return resolved


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, after another to warm up; a GPU's work is waited for."""
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def leave_busy_cores(*, quiet: bool = False) -> int:
    """Take no more of torch's threads than ``spare_threads``, say so unless ``quiet``, and give their number."""
    if (threads := spare_threads()) < torch.get_num_threads():
        torch.set_num_threads(threads)
        if not quiet:
            say(f"Other programs are busy here, so this one uses {threads} of {os.cpu_count()} cores.")
    return threads


def spare_threads(busy: float | None = None) -> int:
    """As many of torch's threads as there are cores that no program uses; one at least.

    Threads of a small network wait for one another at every layer, so that one of them without a core makes all of them
    slow: two threads beside one busy program on two cores train at a tenth of one thread's speed. ``busy``: how many
    cores others use [default: what ``busy_cores`` sees].
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):  # the person has decided; Windows
        return torch.get_num_threads()
    free = (os.cpu_count() or 1) - round(busy_cores() if busy is None else busy)
    return max(1, min(torch.get_num_threads(), free))


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores work while this process waits for so long; on macOS the load of the last minute.

    That load lags: just after an installation, which is when the demonstration runs, it tells of pip.
    """
    try:
        before = _core_ticks()
        time.sleep(seconds)
        work, all_ = (after - first for after, first in zip(_core_ticks(), before, strict=True))
    except OSError:
        return os.getloadavg()[0]
    return (os.cpu_count() or 1) * work / max(all_, 1)


def _core_ticks() -> tuple[int, int]:
    """Those that all cores have worked since the machine began, and all there were (proc(5), /proc/stat). OSError."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    work = user + nice + system + sum(rest)
    return work, work + idle + waiting


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 or bf16 inside float32 products, as torch lets cuDNN do by default; afterwards as it was."""
    before = _tf32()
    _set_tf32("highest", convolutions=False)
    try:
        yield
    finally:
        _set_tf32(*before)


def _tf32() -> tuple[str, bool]:
    with _without_advice():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_tf32(products: str, convolutions: bool) -> None:
    with _without_advice():
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _without_advice() -> Iterator[None]:
    """torch 2.9 to 2.11 advise against these settings, which all versions have, in favour of ones that older lack."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*new API settings to control TF32")
        yield
