"""The demonstration that README's first command runs: SimCLR and CO-SimCLR, every task, a report."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path

import torch

from coss_eval import evaluation, reports, tasks
from coss_eval.data.open import load_dataset
from coss_eval.probes import resolve_device
from coss_eval.runtime.device import spare_threads
from coss_eval.runtime.live import progress_line, say, say_report, training_line, width
from coss_eval.store import Store
from coss_eval.training.loop import train

METHODS = ("simclr", "co-simclr")  # of all methods the ones that learn in a minute
DATA, PRESET = "scattered-digits", "scattered-digits-tiny"


def run(out: Path, *, quiet: bool = False, show: bool = False) -> int:
    """Train, evaluate beside an untrained network, report, ``show`` the page in a browser; the exit code."""
    say("coss-eval quickstart: SimCLR with and without the CO term on scikit-learn's digits, scattered on clutter.")
    say("A demonstration: what training does shows; one seed and a minute of it rank no methods.")
    if (threads := spare_threads()) < torch.get_num_threads():
        torch.set_num_threads(threads)
        say(f"Other programs are busy here, so {threads} of {os.cpu_count()} cores are used.")
    data, device, models = load_dataset(DATA), resolve_device("auto"), []
    for method in METHODS:
        with training_line(method, quiet=quiet) as on_training:
            folder = out / "runs" / method
            models.append(
                train(
                    method,
                    data,
                    preset=PRESET,
                    out=folder,
                    resume=True,  # where an earlier demonstration stopped
                    device=device,
                    quiet=quiet,
                    on_progress=on_training,
                )
            )
    models.append(models[0].untrained(seed=0))
    # with fewer images, levels and seeds than by default: the whole demonstration is to take a few minutes
    quick = [entry.make(**entry.quick) for entry in tasks.entries().values()]
    planned = evaluation.plan(models, data, tasks=quick, out=out, device=device)
    if not quiet:
        say("\n".join(planned.lines()))
    with progress_line(quiet=quiet) as on_progress:
        done = evaluation.execute(planned, on_progress=on_progress)
    for failure in done.failures:  # before the report, which may find nothing to show
        say(f"NOT DONE    {failure}")
    written = reports.write(out)
    say(f"\n{reports.headline_text(Store(out), width())}\n")
    say(f"next        coss-eval robustness --ckpt {out / 'runs/co-simclr/model.safetensors'} --data {DATA} --limit 100")
    say_report(out / "report.html", f"{len(written)} files, report.md, tables/ and figures/ among them,")
    if show:
        webbrowser.open((out / "report.html").resolve().as_uri())  # False where there is no desktop: the path is above
    return 1 if done.failures else 0
