"""Commands to start with: demonstration, checks, training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from coss_eval.cli.app import FAILED, HELD, RUN, START, TASK, app
from coss_eval.cli.flags import Chosen, DataFlags, EngineFlags, ModelFlags, OfData, OfModel, OfRun, OfTask, TrainFlags
from coss_eval.errors import UsageError
from coss_eval.tasks.flags import Words


@app.command(group=START)
def quickstart(
    *,
    out: OfRun[Path] = Path("results/quickstart"),
    quiet: OfRun[bool] = False,
    show: Annotated[OfRun[bool], Parameter(name="--open", negative=())] = False,
) -> int:
    """Train SimCLR and CO-SimCLR on scattered digits, evaluate both and an untrained network by every task, report.

    Parameters
    ----------
    out
        Folder of the runs and the report.
    quiet
        Print the last lines only.
    show
        Show the report in a browser at the end, where there is a desktop.
    """
    from coss_eval.cli.quickstart import run

    return run(out, quiet=quiet, show=show)


@app.command(group=START)
def check(
    *,
    tasks: Chosen = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    device: OfRun[str] = "auto",
) -> int:
    """Dry run: key report, shapes, and one small batch through every task; nothing is kept.

    Parameters
    ----------
    tasks
        Names from coss-eval list tasks, or package.module:Class for tasks of yours [default: all].
    device
        auto, cpu, cuda, cuda:1, ...
    """
    from coss_eval.cli.check import check as run

    return run((models or ModelFlags()).load(), (data or DataFlags()).open(), names=tasks, device=device)


@app.command(group=START)
def verify(
    *,
    imagenet: OfData[Path | None] = None,
    imagenet_c: OfData[Path | None] = None,
    ckpt: OfModel[Words] = (),
    device: OfRun[str] = "auto",
) -> int:
    """Self-checks that always run, and published numbers of known networks where weights and images are given.

    The numbers and their sources are listed either way: supervised ResNet-50, DINO, MoCo v3, BYOL.

    Parameters
    ----------
    imagenet
        Folder with ImageNet's val/, and train/ for kNN and linear probes.
    imagenet_c
        The published ImageNet-C folder.
    ckpt
        NAME=FILE: the published weights of that name in the list, such as dino-vits16=dino_deitsmall16_pretrain.pth
        [default: torchvision's ResNet-50 V1 alone, from its own cache or download].
    device
        auto, cpu, cuda, cuda:1, ...
    """
    from coss_eval.cli.verify import verify as run

    return run(imagenet=imagenet, imagenet_c=imagenet_c, ckpt=ckpt, device=device)


@app.command(group=START)
def reconcile(
    *,
    expected: OfTask[float],
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    limit: OfRun[int] = 2000,
    train_limit: OfRun[int | None] = None,
    pairs: OfTask[bool] = False,
    batch_size: OfRun[int] = 256,
    device: OfRun[str] = "auto",
    seed: OfRun[int] = 0,
) -> int:
    """Why is this accuracy not the published one? Other resizing, crop, normalisation, head: which explains the gap.

    A change at a time on the same test images. A diagnosis, never a score: nothing is stored.

    Parameters
    ----------
    expected
        The published top-1 accuracy in percent: 76.1
    limit
        Number of test images to use (seeded, balanced over classes).
    train_limit
        Number of training images for probes, where the network has no head of its own [default: all].
    pairs
        Where no single change explains the gap, try every two of different kinds together.
    batch_size
        Images per forward pass; it never changes a number.
    device
        auto, cpu, cuda, cuda:1, ...
    seed
        Seed of --limit's images.
    """
    from coss_eval.cli.reconcile import reconcile as run
    from coss_eval.runtime.device import Compute, resolve_device

    models = models or ModelFlags()
    if len(models.ckpt) != 1 or models.untrained or models.label:
        raise UsageError("reconcile reads one network in several ways: give one --ckpt FILE")
    compute = Compute(resolve_device(device), batch_size, cache=False)
    return run(
        models.ckpt[0],
        models.options,
        (data or DataFlags()).open(),
        expected=expected,
        limit=limit,
        train_limit=train_limit,
        pairs=pairs,
        seed=seed,
        compute=compute,
    )


@app.command(group=START)
def train(
    *,
    method: OfTask[str],
    preset: OfTask[str | None] = None,
    data: DataFlags | None = None,
    out: OfRun[Path | None] = None,
    flags: TrainFlags | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", group=TASK)] = (),
    resume: OfRun[bool] = False,
    dry_run: OfRun[bool] = False,
    device: OfRun[str] = "auto",
) -> int:
    """Train a representation; its checkpoint goes straight into coss-eval robustness --ckpt.

    Parameters
    ----------
    method
        byol, dino, ... (see coss-eval list methods), package.module:Class, or one of them with the CO term: co-byol
    preset
        A named configuration (see coss-eval list presets) [default: a ResNet-18 for 100 epochs].
    out
        Folder of the run [default: runs/METHOD].
    set_
        Any other field of the configuration: --set local_weight=0.5 --set crop_min_scale=0.2
    resume
        Go on from the run's last checkpoint, exactly as if it had never stopped.
    dry_run
        Two steps: parameters, FLOPs, memory, speed and the time the run would take.
    device
        auto, cpu, cuda, cuda:1, ...
    """
    from coss_eval.runtime.live import say, training_line
    from coss_eval.training.config import resolve

    config = resolve(method, preset, **((flags or TrainFlags()).given() | _settings(set_)))
    dataset, folder = (data or DataFlags()).open(), out or Path("runs") / method.replace(":", "-")
    first = os.environ.get("RANK", "0") == "0"  # one of torchrun's processes speaks for all
    if first:
        say(f"{method}  {config.summary()}")
    if dry_run:
        from coss_eval.training.dry_run import FEW
        from coss_eval.training.dry_run import dry_run as cost

        lines = cost(config, dataset, device=device, within=FEW).lines()
        if first:
            say("\n".join(lines))
        return 0
    from coss_eval.training.loop import train_config

    with training_line(method) as on_progress:
        train_config(config, dataset, out=folder, resume=resume, device=device, on_progress=on_progress, on_note=say)
    if first:
        say(f"checkpoint  {folder / 'model.safetensors'}")
    return 0


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """The fields that --set names, their values as YAML reads them."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes field=value, got {text!r}")
        if name in ("method", "preset", "data", "resume", "device"):
            raise UsageError(f"--set changes fields of the configuration; give the {name} as --{name}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {text}: {value!r} is no YAML value") from error
    return found


@app.command(group=START)
def sweep(
    what: str,
    *,
    out: OfRun[Path | None] = None,
    work: OfRun[Path | None] = None,
    size: OfTask[str | None] = None,
    data_root: OfData[Path | None] = None,
    job: OfRun[int | None] = None,
    minutes: OfRun[float | None] = None,
    list_: Annotated[bool, Parameter(name="--list", group=RUN)] = False,
    page: OfRun[bool] = False,
    device: OfRun[str] = "auto",
    where: EngineFlags | None = None,
) -> int:
    """Train and evaluate the runs of one YAML in their order, and write a page on them; the same call goes on.

    Parameters
    ----------
    what
        A YAML file, or a shipped sweep (see coss-eval list sweeps): data, preset, methods, grid, fixed, seeds.
    out
        Folder of the runs, their results and the page [default: runs/sweep-WHAT].
    work
        Folder for the trainer's states while runs are trained, never needed afterwards [default: the same].
    size
        One of the sizes that the YAML has, such as gpu [default: the entries at its top].
    data_root
        Where named datasets lie [env: COSS_DATA_ROOT].
    job
        Do this run only, by its number in --list: sbatch --array=1-20 ... --job $SLURM_ARRAY_TASK_ID
    minutes
        Begin nothing that is expected to end later than this number of minutes from now, by what finished runs took.
    list_
        Show the runs, how far they are (running says by whom; lost was begun, and nobody is at it) and what they cost.
        Nothing is trained, and nothing written.
    page
        Only write the page anew, on what is there: nothing is trained or evaluated, so any machine will do.
    device
        auto, cpu, cuda, cuda:1, ...
    """
    from coss_eval.runtime.live import say, training_line
    from coss_eval.sweeps import plan, report, state

    chosen = plan.read_sweep(what, size)
    folder = out or Path("runs") / "-".join(["sweep", Path(what).stem, *([size] if size else [])])
    cluster = (where or EngineFlags()).cluster(device)
    everything = state.states(chosen, folder, work or folder)
    if list_:
        say("\n".join(report.list_lines(chosen, everything)))
        return 0
    if page:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: give that of the sweep's runs as --out")
        report.report(state.settled(chosen, folder), everything, folder)
        say(f"report      {folder / 'report.md'}")
        return 0

    def tell(run: plan.TrainingRun, what: str) -> None:
        say(f"[{run.number}/{len(everything)}] {run.name} {what}")

    if cluster is not None:
        from coss_eval.sweeps.on_ray import SweepOnRay

        engine = SweepOnRay(chosen, folder, work or folder, cluster, data_root, minutes, tell)
        failures, held = engine.run(job), engine.held
    else:
        from coss_eval.sweeps.work import Worker

        first = os.environ.get("RANK", "0") == "0"  # one of torchrun's processes speaks for all
        worker = Worker(
            chosen,
            folder,
            work or folder,
            data_root=data_root,
            device=device,
            minutes=minutes,
            on_run=tell if first else lambda run, what: None,
            on_note=say,
            watch=lambda name: training_line(name, quiet=not first),
        )
        failures, held = worker.run(job), worker.held
    for failure in failures:
        say(f"NOT DONE    {failure}")
    for line in held:
        say(f"ELSEWHERE   {line} is at another process")
    if (folder / "report.md").exists():
        say(f"report      {folder / 'report.md'}")
    return FAILED if failures else HELD if held else 0
