"""The demonstration that README's first command runs: BYOL and CO-BYOL on digits, every task, the report."""

from __future__ import annotations

from pathlib import Path

from coss_eval import evaluation, reports
from coss_eval.cli.terminal import progress_line, say, training_line
from coss_eval.data.open import load_dataset
from coss_eval.probes import resolve_device
from coss_eval.store import Store
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.crops.task import Crops
from coss_eval.tasks.internal.task import Internal
from coss_eval.tasks.probe.task import Probe
from coss_eval.tasks.redundancy.task import Redundancy
from coss_eval.training.loop import train

# every task, with fewer images, levels and seeds than by default: the whole demonstration is to take a few minutes
TASKS = (
    Probe(),
    Corruptions(),
    Attacks(images=100, steps=10),
    Internal(levels=(0.1, 0.3, 0.5, 0.7, 0.9), seeds=2),
    Crops(scales=(0.5,), counts=(1, 4)),
    Redundancy(),
)
METHODS = ("byol", "co-byol")


def run(out: Path, *, quiet: bool = False) -> int:
    """Train, evaluate beside an untrained network, report; the exit code."""
    say("coss-eval quickstart: BYOL with and without the CO term, a demonstration on scikit-learn's digits.")
    say("Digits and minutes of training support no ranking of methods.")
    data, device, models = load_dataset("digits"), resolve_device("auto"), []
    for method in METHODS:
        with training_line(method, quiet=quiet) as on_training:
            folder = out / "runs" / method
            models.append(
                train(
                    method,
                    data,
                    preset="digits-tiny",
                    out=folder,
                    resume=True,  # where an earlier demonstration stopped
                    device=device,
                    on_progress=on_training,
                )
            )
    models.append(models[0].untrained(seed=0))
    planned = evaluation.plan(models, data, tasks=TASKS, out=out, device=device)
    if not quiet:
        say("\n".join(planned.lines()))
    with progress_line(quiet=quiet) as on_progress:
        done = evaluation.execute(planned, on_progress=on_progress)
    for failure in done.failures:  # before the report, which may find nothing to show
        say(f"NOT DONE    {failure}")
    written = reports.write(out)
    say(f"\n{reports.headline_text(Store(out))}\n")
    say(f"report      {out / 'report.html'} ({len(written)} files in {out})")
    say(f"next        coss-eval robustness --ckpt {out / 'runs/co-byol/model.safetensors'} --data digits --limit 100")
    return 1 if done.failures else 0
