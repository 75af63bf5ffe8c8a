"""What interrupts an epoch: a signal that asks to stop, and the clock that asks for a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from coss_eval.runtime.processes import rank, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a scheduler's end, Slurm's --signal=USR1@120
SAME_PRESS = 1.0  # seconds: a launcher may pass on a Ctrl-C that the terminal has sent already


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, and has saved its state."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruptions:
    """While entered: signals are noted instead of obeyed, and all processes learn of them after the same step.

    A second Ctrl-C stops at once. Only the main thread of a process can note signals; what a process ignores it goes on
    to ignore. ``minutes``: how long the state may be older than the run, 0 for however long.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._own = 0  # the signal that came to this process
        self._came = self._saved = time.monotonic()
        self._before: dict[int, Any] = {}
        self._group: Any = None  # of the processes, where there are several
        self.stop = 0  # the signal that all processes have agreed to obey
        self.wanted = False  # a checkpoint, after the last step

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        if world_size() > 1:  # not NCCL's: nobody should wait for a GPU to learn of a signal
            self._group = dist.new_group(backend="gloo")
        self.saved()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._own and now - self._came > SAME_PRESS:
            raise KeyboardInterrupt
        if not self._own:
            self._own, self._came = number, now

    def look(self) -> bool:
        """Whether a checkpoint is wanted now, as the clock of the first process says or to stop; by all processes."""
        due = rank() == 0 and 0 < self._seconds <= time.monotonic() - self._saved
        asked = torch.tensor([self._own, int(due)])
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        self.stop, by_clock = asked.tolist()
        self.wanted = bool(self.stop or by_clock)
        return self.wanted

    def saved(self) -> None:
        """The state on disk is that of now."""
        self._saved, self.wanted = time.monotonic(), False

    def refuse_to_go_on(self) -> None:
        """Stopped where a signal has come, to any process up to the last step or to this one since."""
        if number := self.stop or self._own:
            raise Stopped(number)
