"""Batches and steps of several methods, a run and refusals under torchrun: two_processes.py OUT, a file."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_parts import SMALL, TINY, digits

from coss_eval.errors import UsageError
from coss_eval.runtime.processes import rank
from coss_eval.training.config import resolve
from coss_eval.training.gather import mean_over_ranks
from coss_eval.training.loop import Trainer, train

SMALL_VIEWS = {"small_views": 2, "small_size": 16}
CASES: dict[str, dict[str, Any]] = {  # a method, and after a blank what else
    **{f"co-{name}": {} for name in ("byol", "dino", "mocov3", "simclr", "vicreg", "barlow")},
    **{"simsiam": {}, "supervised": {}},
    **{f"{name} own": SMALL_VIEWS for name in ("co-byol", "co-mocov3", "simsiam")},
    "byol shared": {**SMALL_VIEWS, "small_predictor": "shared"},
}
STEPPED = [f"{prefix}{name}" for name in ("byol", "dino", "mocov3", "simclr") for prefix in ("", "co-")]


def several_steps(method: str) -> dict[str, Any]:
    """Losses of 4 optimiser steps in float64, and all that a state has of the network afterwards."""
    fields: dict[str, Any] = {**TINY, "epochs": 2, "options": SMALL[method.removeprefix("co-")]}
    run = Trainer(resolve(method, **fields), digits(64), Path(), torch.device("cpu"))
    run.objective.double()
    run.network = run._network()
    views = run.setup.views_of
    run.setup.views_of = lambda batch, epoch: [view.double() for view in views(batch, epoch)]
    losses = []
    for run.epoch in range(2):
        losses += [mean_over_ranks(run.take_step(batch)) for batch in run.setup.feed.epoch(run.epoch)]
    return {"losses": torch.stack(losses), "weights": run.objective.state_dict()}


def one_batch(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Losses (total, global, local) of the whole batch, gradients, and buffers (running statistics) after it."""
    method = case.partition(" ")[0]
    options = {} if method == "supervised" else SMALL[method.removeprefix("co-")]
    run = Trainer(resolve(method, **TINY, **CASES[case], options=options), digits(64), Path(), torch.device("cpu"))
    run.objective.to(dtype)
    run.network = run._network()
    views = run.setup.views_of
    run.setup.views_of = lambda batch, epoch: [view.to(dtype) for view in views(batch, epoch)]
    losses = run._backward(next(run.setup.feed.epoch(0)), wait=False)
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
        Trainer(resolve("byol", **TINY, accumulate=16), digits(64), Path(), torch.device("cpu"))
    except UsageError as error:
        return str(error)
    return ""


def divided(out: Path) -> str:
    """What a run says that goes on where one process does not see the state that another has written."""
    here = out if rank() == 0 else out.with_name("elsewhere")
    try:
        train("co-dino", digits(64), out=here, device="cpu", resume=True, **TINY, epochs=2, options=SMALL["dino"])
    except UsageError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    dist.init_process_group("gloo")
    pairs = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.float64)]
    found: dict[str, Any] = {f"{case} {dtype}": one_batch(case, dtype) for case, dtype in pairs}
    found["refusal"] = refusal()
    found["steps"] = {method: several_steps(method) for method in STEPPED}
    short_run(Path(sys.argv[1]).with_name("run"))
    found["divided"] = divided(Path(sys.argv[1]).with_name("run"))
    if rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
