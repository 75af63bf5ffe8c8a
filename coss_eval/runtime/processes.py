"""Several processes of one run: how they are started and joined, which device each takes, what they tell one another.

torchrun starts them, or ``start_on_each`` from one command; both say by the environment (RANK, LOCAL_RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE) which of them a process is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from coss_eval.errors import UsageError
from coss_eval.runtime.device import device_names, resolve_device
from coss_eval.runtime.live import PARTED, TOGETHER, Parted, tell
from coss_eval.runtime.memory import keep_freed_memory

T = TypeVar("T")

PARENT = "COSS_PARENT"  # in the environment of a process that start_on_each started: the number of the one that did
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # in the environment of one of several
LAST_WORDS = 30.0  # seconds that a process has to end after it was asked to
PR_SET_PDEATHSIG = 1  # sys/prctl.h


def world_size() -> int:
    """How many processes are joined; 1 where none are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of the joined processes this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def own_device(device: str | torch.device) -> torch.device:
    """This process's device: of several names its own, for "cuda" the GPU of its number on this machine.

    UsageError where there are not as many names as processes, or devices of two kinds, whose numbers differ.
    """
    here, number = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    names = device_names(str(device))
    if len(names) == 1:
        own = resolve_device(device)
        several = own.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1
        return resolve_device(f"cuda:{number}") if several else own
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UsageError(f"device {str(device)!r} mixes kinds, whose numbers differ: give devices of one kind")
    if len(names) != here:
        raise UsageError(
            f"device {str(device)!r} names {len(names)} devices for {here} process{'es' if here > 1 else ''}: give one "
            "for each; the command line starts them itself, Python under torchrun --nproc-per-node "
            f"{len(names)}"
        )
    return resolve_device(names[number])


@contextmanager
def process_group(device: str | torch.device, *, patience: timedelta | None = None) -> Iterator[torch.device]:
    """This process's device; where there are others of its run they are joined, and parted again at the end.

    Tensors on GPUs travel by nccl, all others by gloo. ``patience``: how long one waits for the others to come to the
    same point [default: torch's]. On the CPU the process keeps its freed memory from then on (``keep_freed_memory``).
    """
    own = own_device(device)
    if own.type == "cpu":
        keep_freed_memory()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield own
        return
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    if TOGETHER in os.environ:  # started by start_on_each
        _end_with(int(os.environ[PARENT]))
        meeting = (Path(os.environ[TOGETHER]) / "meeting").as_uri()
        dist.init_process_group(backend, meeting, patience, world_size=size, rank=int(os.environ["RANK"]))
    else:
        _join_torchruns(backend, patience)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def _join_torchruns(backend: str, patience: timedelta | None) -> None:
    """Meet in this attempt's part of torchrun's store: a restart finds the addresses of dead processes in the rest."""
    from torch.distributed.distributed_c10d import PrefixStore, default_pg_timeout
    from torch.distributed.rendezvous import rendezvous  # where torch has no processes there is neither

    store, number, size = next(rendezvous("env://", timeout=patience or default_pg_timeout))
    own = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, timeout=patience, store=own, rank=number, world_size=size)


def gathered(value: T) -> list[T]:
    """Each process's value, by its number; all processes have to call it. CossError where one of them has ended."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as error:  # gloo's, when a connection is closed
        raise Parted() from error
    return found  # type: ignore[return-value]  # filled now


def first_says(value: T) -> T:
    """The first process's value, in all of them."""
    return gathered(value if rank() == 0 else None)[0]  # type: ignore[return-value]  # of the first


@contextmanager
def one_goes_ahead() -> Iterator[None]:
    """The block, first by one process of each machine, then by the others, which find what that one has cached."""
    waits = os.environ.get("LOCAL_RANK", "0") != "0"
    if waits:
        gathered(None)
    yield
    if not waits:
        gathered(None)


@contextmanager
def apart() -> Iterator[tuple[int, int]]:
    """This process's number and how many there are; in the block it is alone: what would join the others finds none.

    For work that they share by whole pieces before they meet. What was started by ``start_on_each`` ends with it here,
    too.
    """
    if TOGETHER in os.environ:
        _end_with(int(os.environ[PARENT]))
    held = {name: os.environ.pop(name) for name in _NUMBERS if name in os.environ}
    try:
        yield int(held.get("RANK", "0")), int(held.get("WORLD_SIZE", "1"))
    finally:
        os.environ.update(held)


def start_on_each(devices: Sequence[str]) -> int:
    """Run this very command in a process for each device, together; its exit code is that of the first process.

    The first one speaks for all. Where one fails the others are stopped, what is wrong is said once (see
    ``live.complain``), and its exit code is the command's. An interrupt, or the end of this process, ends them.
    """
    with tempfile.TemporaryDirectory(prefix="coss-eval-") as folder:
        shared = {
            **os.environ,
            TOGETHER: folder,
            PARENT: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "WORLD_SIZE": str(len(devices)),
            "LOCAL_WORLD_SIZE": str(len(devices)),
        }
        shared.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // len(devices))))
        command, processes = [sys.executable, "-m", "coss_eval", *sys.argv[1:]], list[subprocess.Popen[bytes]]()
        try:
            for number in map(str, range(len(devices))):
                processes.append(subprocess.Popen(command, env=shared | {"RANK": number, "LOCAL_RANK": number}))
            while not any(process.poll() not in (None, 0, PARTED) for process in processes):
                if all(process.returncode is not None for process in processes):
                    return max(process.returncode for process in processes)
                time.sleep(0.05)
            codes = [process.returncode for process in processes]
            place, code = next((i, code) for i, code in enumerate(codes) if code not in (None, 0, PARTED))
        finally:
            _stop(processes)
        if code < 0 or (place > 0 and not (Path(folder) / "told").exists()):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            tell(
                f"coss-eval: process {place + 1} of {len(devices)}, on {devices[place]}, {how}, and the others were "
                "stopped; what was done is stored, the same command goes on from there"
            )
    return code if code > 0 else 128 - code


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: asked first, so that it can let go of its cells, then killed."""
    for process in processes:
        process.terminate()  # nothing where it has ended
    deadline = time.monotonic() + LAST_WORDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with(parent: int) -> None:
    """Have this process asked to end when the one that started it does, however that ends; Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended before
            raise KeyboardInterrupt
