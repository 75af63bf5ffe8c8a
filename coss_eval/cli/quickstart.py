"""The demonstration that README's first command runs: SimCLR and CO-SimCLR, every task, a report."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path

import torch

from coss_eval import evaluation, reports, tasks
from coss_eval.checkpoints.load import load_model
from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.evaluation.run import PATIENCE, Run
from coss_eval.probes import resolve_device
from coss_eval.runtime.device import leave_busy_cores
from coss_eval.runtime.live import progress_line, say, say_report, speaks, training_line, width
from coss_eval.runtime.processes import apart, gathered, one_goes_ahead, process_group, start_on_each
from coss_eval.store import Store
from coss_eval.store.runs import MODEL
from coss_eval.training.loop import train

METHODS = ("simclr", "co-simclr")  # of all methods the ones that learn in a minute
DATA, PRESET = "scattered-digits", "scattered-digits-tiny"


def run(out: Path, *, quiet: bool = False, show: bool = False) -> int:
    """Train, evaluate beside an untrained network, report, ``show`` the page in a browser; the exit code.

    On a CPU a process for each method where there are cores for them: threads gain little on networks as small.
    """
    threads = leave_busy_cores()
    device = resolve_device("auto")
    if device.type == "cpu" and threads >= len(METHODS) and "WORLD_SIZE" not in os.environ:
        return start_on_each([device.type] * len(METHODS))
    say("coss-eval quickstart: SimCLR with and without the CO term on digits scattered on coloured grounds.")
    say("A demonstration: what training does shows; one seed and a minute of it rank no methods.")
    data = load_dataset(DATA)
    _train(data, out, device, quiet=quiet)
    with process_group(device, patience=PATIENCE) as own:
        done = _evaluate(data, out, own, quiet=quiet or not speaks())
    return _report(done, show=show) if speaks() else 0


def _train(data: Dataset, out: Path, device: torch.device, *, quiet: bool) -> None:
    """Each process its methods, one by one, alone; the first one shows how far it is."""
    with apart() as (number, processes):
        for method in METHODS[number::processes]:
            with training_line(method, quiet=quiet or number > 0) as on_training:
                train(
                    method,
                    data,
                    preset=PRESET,
                    out=_folder(out, method),
                    resume=True,  # where an earlier demonstration stopped
                    device=device,
                    quiet=quiet,
                    on_progress=on_training,
                )


def _folder(out: Path, method: str) -> Path:
    return out / "runs" / method


def _evaluate(data: Dataset, out: Path, device: torch.device, *, quiet: bool) -> Run:
    """Every task on the trained networks and an untrained one, the cells shared by the processes."""
    gathered(None)  # until all are trained
    models = [load_model(_folder(out, method) / MODEL) for method in METHODS]
    models.append(models[0].untrained(seed=0))
    # with fewer images, levels and seeds than by default: the whole demonstration is to take a few minutes
    quick = [entry.make(**entry.quick) for entry in tasks.entries().values()]
    with one_goes_ahead():
        planned = evaluation.plan(models, data, tasks=quick, out=out, device=device)
    if not quiet:
        say("\n".join(planned.lines()))
    with progress_line(quiet=quiet) as on_progress:
        return evaluation.execute(planned, on_progress=on_progress, together=True)


def _report(done: Run, *, show: bool) -> int:
    """What is missing, the headline, where the report is; the exit code."""
    for failure in done.failures:  # before the report, which may find nothing to show
        say(f"NOT DONE    {failure}")
    out = done.path
    written = reports.write(out)
    say(f"\n{reports.headline_text(Store(out), width())}\n")
    trained = _folder(out, METHODS[-1]) / MODEL
    say(f"next        coss-eval robustness --ckpt {trained} --data {DATA} --limit 100")
    say_report(out / "report.html", f"{len(written)} files, report.md, tables/ and figures/ among them,")
    if show:
        webbrowser.open((out / "report.html").resolve().as_uri())  # False where there is no desktop: the path is above
    return 1 if done.failures else 0
