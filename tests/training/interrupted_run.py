"""Trains and sends itself a signal after so many steps: interrupted_run.py OUT STEP SIGNAL METHOD FIELDS (JSON).

A process that torchrun has started anew does not, nor does any without a STEP. What stops it ends it with exit code 0.
"""

import json
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


def interrupt(progress: TrainingProgress) -> None:
    if str(progress.step) == sys.argv[2] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.Signals[sys.argv[3]])


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    out, fields = sys.argv[1], json.loads(sys.argv[5])
    train(sys.argv[4], digits(), out=out, device="cpu", resume=True, on_progress=interrupt, **fields)
