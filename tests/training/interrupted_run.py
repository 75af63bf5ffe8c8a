"""Trains as test_resume does, and kills itself, as kill -9 does, after so many steps: interrupted_run.py OUT STEPS."""

import os
import signal
import sys

from training_parts import DROPPING, TINY, digits

from coss_eval.training.loop import TrainingProgress, train

RUN = {
    **TINY,
    **DROPPING,
    "hidden": 32,
    "epochs": 4,
    "sampling": "subset",
    "local_grid": 2,
    "optimizer": "lars",
    "lr": 0.5,
    "probe_every": 1,
}


def stop(progress: TrainingProgress) -> None:
    if progress.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train("co-byol", digits(), out=sys.argv[1], device="cpu", on_progress=stop, **RUN)
