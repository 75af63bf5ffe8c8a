"""Batches of several methods, a run and a refusal under torchrun, to a file and beside it: two_processes.py OUT."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_parts import SMALL, TINY, digits

from coss_eval.errors import UsageError
from coss_eval.training.config import resolve
from coss_eval.training.gather import mean_over_ranks, rank
from coss_eval.training.loop import Run, train

METHODS = ("co-byol", "co-dino", "co-mocov3", "co-simclr", "co-vicreg", "co-barlow", "simsiam", "supervised")


def one_batch(method: str, dtype: torch.dtype) -> dict[str, Any]:
    """Losses (total, global, local) of the whole batch, gradients, and buffers (running statistics) after it."""
    options = {} if method == "supervised" else SMALL[method.removeprefix("co-")]
    run = Run(resolve(method, **TINY, options=options), digits(64), Path(), torch.device("cpu"))
    run.objective.to(dtype)
    run.network = run._network()
    views = run.task.views_of
    run.task.views_of = lambda batch, epoch: [view.to(dtype) for view in views(batch, epoch)]
    losses = run._backward(next(run.task.feed.epoch(0)), wait=False)
    run.objective.after_step(0.5)
    gradients = {key: p.grad for key, p in run.objective.named_parameters() if p.grad is not None}
    return {
        "losses": mean_over_ranks(losses),
        "gradients": gradients,
        "buffers": dict(run.objective.named_buffers()),
    }


def short_run(out: Path) -> None:
    train("co-dino", digits(64), out=out, device="cpu", **TINY, epochs=2, options=SMALL["dino"])


def refusal() -> str:
    """What a batch says that divides into micro-batches, but each process's part of it does not."""
    try:
        Run(resolve("byol", **TINY, accumulate=16), digits(64), Path(), torch.device("cpu"))
    except UsageError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    pairs = [(method, dtype) for method in METHODS for dtype in (torch.float32, torch.float64)]
    found: dict[str, Any] = {f"{method} {dtype}": one_batch(method, dtype) for method, dtype in pairs}
    found["refusal"] = refusal()
    short_run(Path(sys.argv[1]).with_name("run"))
    if rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
