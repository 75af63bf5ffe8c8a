"""Two steps of several methods under torchrun, their losses and weights to a file: python two_processes.py OUT."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_parts import SMALL, TINY, digits

from coss_eval.training.config import resolve
from coss_eval.training.gather import mean_over_ranks, rank
from coss_eval.training.loop import Run

METHODS = ("co-byol", "co-dino", "co-mocov3", "co-simclr", "co-vicreg", "co-barlow", "simsiam", "supervised")


def two_steps(method: str) -> dict[str, Any]:
    options = {} if method == "supervised" else SMALL[method.removeprefix("co-")]
    config = resolve(method, **{**TINY, "lr": 0.02, "epochs": 2}, options=options)
    run = Run(config, digits(64), Path(), torch.device("cpu"), resume=True)
    losses = [mean_over_ranks(run.take_step(batch)) for batch in run.task.feed.epoch(0)]
    return {"losses": torch.stack(losses), "objective": run.objective.state_dict()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {method: two_steps(method) for method in METHODS}
    if rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
