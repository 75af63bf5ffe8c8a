"""The demonstration that README's first command runs: digits, a minute of training, every task, the report."""

from __future__ import annotations

from pathlib import Path

from coss_eval import evaluation, reports
from coss_eval.data.open import load_dataset
from coss_eval.probes import resolve_device
from coss_eval.store import Store
from coss_eval.tasks.attacks import Attacks
from coss_eval.tasks.corruptions import Corruptions
from coss_eval.tasks.internal import Internal
from coss_eval.tasks.probe import Probe
from coss_eval.tasks.redundancy import Redundancy
from coss_eval.terminal import progress_line, say
from coss_eval.training.supervised import Recipe, train_supervised

# every task, with fewer images, levels and seeds than by default: the whole demonstration is to take a minute or two
TASKS = (
    Probe(),
    Corruptions(),
    Attacks(images=100, steps=10),
    Internal(levels=(0.1, 0.3, 0.5, 0.7, 0.9), seeds=2),
    Redundancy(),
)
RECIPE = Recipe(arch="resnet18", stem="cifar", width=16, epochs=12, batch_size=64, lr=0.2, padding=2)


def run(out: Path, *, quiet: bool = False) -> int:
    """Train, evaluate beside an untrained network, report; the exit code."""
    say("coss-eval quickstart: a demonstration on scikit-learn's digits. Digits support no ranking of methods.")
    data, device = load_dataset("digits"), resolve_device("auto")

    def on_epoch(epoch: int, loss: float, rate: float) -> None:
        if not quiet and epoch % 4 == 0:
            say(f"training    epoch {epoch}/{RECIPE.epochs}, loss {loss:.3f}, {rate:,.0f} images/s")

    trained = train_supervised(data, RECIPE, out=out, device=device, on_epoch=on_epoch)
    planned = evaluation.plan([trained, trained.untrained(seed=0)], data, tasks=TASKS, out=out, device=device)
    if not quiet:
        say("\n".join(planned.lines()))
    with progress_line(quiet=quiet) as on_progress:
        done = evaluation.execute(planned, on_progress=on_progress)
    written = reports.write(out)
    say(f"\n{reports.headline_text(Store(out))}\n")
    say(f"report      {out / 'report.html'} ({len(written)} files in {out})")
    say(f"next        coss-eval robustness --ckpt {out / 'model.safetensors'} --data digits --limit 100")
    for failure in done.failures:
        say(f"NOT DONE    {failure}")
    return 1 if done.failures else 0
