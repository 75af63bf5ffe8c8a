"""The command line: one short function a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Yaml

from coss_eval import __version__
from coss_eval.errors import CossError, UsageError
from coss_eval.flags import DataFlags, Fractions, ModelFlags, RunFlags, TrainFlags

if TYPE_CHECKING:
    from coss_eval.data.open import Dataset
    from coss_eval.evaluation import Plan
    from coss_eval.tasks.task import Task

app = App(
    name="coss-eval",
    help="How robust is this visual representation, and why? Start with: coss-eval quickstart",
    version=__version__,
    default_parameter=Parameter(negative=()),
)
START, EVALUATE, LOOK = (
    Group.create_ordered(name) for name in ("Start here", "Evaluate", "Look at results and inputs")
)


def _evaluate(models: ModelFlags, data: DataFlags, run: RunFlags, tasks: Sequence[str | Task]) -> int:
    """Plan, say so, run, report: what every evaluating command does."""
    from coss_eval import evaluation
    from coss_eval.terminal import progress_line, say

    loaded = models.load()
    dataset = data.open()
    out = run.out or Path("results") / "-".join([dataset.name, *(model.name for model in loaded)]).replace("/", "-")
    planned = evaluation.plan(
        loaded,
        dataset,
        out=out,
        tasks=tasks,
        limit=run.limit,
        seed=run.seed,
        device=run.device,
        batch_size=run.batch_size,
        cache=not run.no_cache,
        overwrite=run.overwrite,
    )
    if not run.quiet or run.dry_run:
        _show_plan(planned, out)
    if run.dry_run:
        return 0
    with progress_line(quiet=run.quiet) as on_progress:
        done = evaluation.execute(
            planned, overwrite=run.overwrite, budget_hours=run.budget_hours, on_progress=on_progress
        )
    say("")
    say(_headline(done.path, run.baseline))
    say(f"\nreport      {out / 'report.md'} and report.html")
    for failure in done.failures:
        say(f"NOT DONE    {failure}")
    return 1 if done.failures else 0


def _show_plan(planned: Plan, out: Path) -> None:
    from coss_eval.terminal import duration, say

    for subject in planned.subjects:
        if subject.model.report is not None:
            say("\n".join(subject.model.report.lines()))
    say("\n".join(planned.lines()))
    say(f"out         {out}")
    say(f"estimate    {duration(planned.seconds())}\n")


def _headline(path: Path, baseline: str | None) -> str:
    from coss_eval import reports
    from coss_eval.store import Store

    reports.write(path, baseline=baseline)
    return reports.headline_text(Store(path))


@app.command(group=START)
def quickstart(*, out: Path = Path("results/quickstart"), quiet: bool = False) -> int:
    """Train a small network on digits, evaluate it beside an untrained one with every task, write the report."""
    from coss_eval.quickstart import run

    return run(out, quiet=quiet)


@app.command(group=START)
def check(*, models: ModelFlags | None = None, data: DataFlags | None = None, device: str = "auto") -> int:
    """Dry run: key report, shapes, and one small batch through every task; nothing is kept."""
    from coss_eval.checks import check as run

    return run((models or ModelFlags()).load(), (data or DataFlags()).open(), device=device)


@app.command(group=START)
def verify(
    *, imagenet: Path | None = None, imagenet_c: Path | None = None, resnet50: Path | None = None, device: str = "auto"
) -> int:
    """Self-checks that always run, and known anchors (ResNet-50 V1: 76.1 % top-1) where their data are given.

    imagenet: folder with ImageNet's val/; imagenet_c: the published ImageNet-C folder; resnet50: torchvision's V1
    weights file (otherwise torchvision's own cache or download is used).
    """
    from coss_eval.verify import verify as run

    return run(imagenet=imagenet, imagenet_c=imagenet_c, resnet50=resnet50, device=device)


@app.command(group=START)
def train(
    *,
    method: str = "supervised",
    preset: str | None = None,
    data: DataFlags | None = None,
    out: Path | None = None,
    flags: TrainFlags | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    resume: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> int:
    """Train a representation; its checkpoint goes straight into coss-eval robustness --ckpt.

    Parameters
    ----------
    method
        byol, dino, mocov3, simclr, simsiam, vicreg, barlow, supervised, or one of them with the CO term: co-byol, ...
    preset
        A named configuration (see coss-eval list); supervised without one is a small baseline with crops and flips.
    out
        Folder of the run [default: runs/METHOD].
    set_
        Any other field of the configuration: --set local_weight=0.5 --set crop_min_scale=0.2
    resume
        Go on from the run's last checkpoint, exactly as if it had never stopped.
    dry_run
        Two steps: parameters, FLOPs, memory, speed and the time the run would take.
    """
    import yaml

    from coss_eval.terminal import say

    overrides = (flags or TrainFlags()).given()
    for text in set_:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes field=value, got {text!r}")
        overrides[name] = yaml.safe_load(value)
    dataset, folder = (data or DataFlags()).open(), out or Path("runs") / method
    if method == "supervised" and preset is None:
        _train_baseline(dataset, folder, device, overrides)
    elif dry_run:
        from coss_eval.training.dry_run import dry_run as cost

        say("\n".join(cost(method, dataset, preset=preset, device=device, **overrides).lines()))
        return 0
    else:
        _train(method, dataset, folder, overrides | {"preset": preset, "resume": resume, "device": device})
    say(f"checkpoint  {folder / 'model.safetensors'}")
    return 0


def _train_baseline(data: Dataset, out: Path, device: str, overrides: dict[str, Any]) -> None:
    from coss_eval.errors import unknown_name
    from coss_eval.probes import resolve_device
    from coss_eval.terminal import say
    from coss_eval.training.supervised import Recipe, train_supervised

    known = {field.name for field in fields(Recipe)}
    for name in overrides:
        if name not in known:
            raise unknown_name("field of the supervised baseline", name, known)
    recipe = Recipe(**overrides)

    def on_epoch(epoch: int, loss: float, rate: float) -> None:
        say(f"epoch {epoch:3d}/{recipe.epochs}   loss {loss:.4f}   {rate:,.0f} images/s")

    train_supervised(data, recipe, out=out, device=resolve_device(device), on_epoch=on_epoch)


def _train(method: str, data: Dataset, out: Path, options: dict[str, Any]) -> None:
    from coss_eval.terminal import duration, live_line, say
    from coss_eval.training.loop import Progress
    from coss_eval.training.loop import train as run

    with live_line() as show:

        def on_progress(now: Progress) -> None:
            knn = "" if now.knn is None else f"   kNN {100 * now.knn:.1f} %"
            where = f"epoch {now.epoch}/{now.epochs}   loss {now.loss:.4f}   {now.images_per_second:,.0f} images/s"
            show(f"{where}{knn}   {duration(now.seconds_left)} left", now.step == now.steps)

        run(method, data, out=out, on_progress=on_progress, on_note=say, **options)


@app.command(group=EVALUATE)
def robustness(
    *,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: Literal["native", "reference"] = "native",
) -> int:
    """Evaluate checkpoints with every task and write the report."""
    from coss_eval.tasks import NAMES

    return evaluate(tasks=tuple(NAMES), models=models, data=data, run=run, backend=backend)


@app.command(group=EVALUATE)
def evaluate(
    *,
    tasks: tuple[str, ...] = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: Literal["native", "reference"] = "native",
) -> int:
    """Evaluate checkpoints with the tasks named by --tasks (all by default)."""
    from coss_eval.tasks import NAMES, task_class

    chosen = [task_class(name) for name in tasks or NAMES]
    made = [task(backend=backend) if "backend" in task.__dataclass_fields__ else task() for task in chosen]  # type: ignore[attr-defined, call-arg]
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), made)


@app.command(group=EVALUATE)
def probe(*, models: ModelFlags | None = None, data: DataFlags | None = None, run: RunFlags | None = None) -> int:
    """Linear probe, few-label probes and kNN on the frozen global representation."""
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), ["probe"])


@app.command(group=EVALUATE)
def corruptions(
    *,
    names: tuple[str, ...] = (),
    severities: tuple[int, ...] = (1, 2, 3, 4, 5),
    table: Literal["imagenet", "tiny-imagenet", "cifar"] | None = None,
    flavour: Literal["imagecorruptions", "imagenet-c"] = "imagecorruptions",
    backend: Literal["native", "reference"] = "native",
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Accuracy under the 19 image corruptions of ImageNet-C (or those in --names), at severities 1 to 5."""
    from coss_eval.corruptions.names import NAMES
    from coss_eval.tasks.corruptions import Corruptions

    task = Corruptions(names or tuple(NAMES), severities, backend, flavour, table)
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


@app.command(group=EVALUATE)
def attacks(
    *,
    eps: Fractions = None,
    eps_l2: Fractions = None,
    attack: tuple[str, ...] = ("fgsm:linf", "pgd:linf", "pgd:l2"),
    steps: int = 20,
    images: int = 1000,
    backend: Literal["native", "reference"] = "native",
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Robust accuracy under FGSM and PGD over a rising list of eps (8/255 is understood); 1,000 images by default."""
    from coss_eval.tasks.attacks import L2_EPS, LINF_EPS, Attacks

    pairs = tuple((name, norm or "linf") for name, _, norm in (text.partition(":") for text in attack))
    task = Attacks(pairs, {"linf": eps or LINF_EPS, "l2": eps_l2 or L2_EPS}, steps, None, images, backend)
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


@app.command(group=EVALUATE)
def internal(*, models: ModelFlags | None = None, data: DataFlags | None = None, run: RunFlags | None = None) -> int:
    """Accuracy while channels or locations are masked inside the network."""
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), ["internal"])


@app.command(group=EVALUATE)
def redundancy(*, models: ModelFlags | None = None, data: DataFlags | None = None, run: RunFlags | None = None) -> int:
    """How alike the local representations of an image are, beside an untrained network's."""
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), ["redundancy"])


@app.command(group=LOOK)
def report(folder: Path, *, baseline: str | None = None) -> int:
    """Write report.md, report.html, tables and figures again from a results folder."""
    from coss_eval import reports
    from coss_eval.terminal import say

    for path in reports.write(folder, baseline=baseline):
        say(str(path))
    return 0


@app.command(group=LOOK)
def figures(folder: Path, *, out: Path | None = None) -> int:
    """Draw the figures of a results folder as PDF and PNG."""
    from coss_eval.reports import figures as drawing
    from coss_eval.store import Store
    from coss_eval.terminal import say

    for path in drawing.write(Store(folder), out or folder / "figures"):
        say(str(path))
    return 0


@app.command(group=LOOK)
def compare(a: Path, b: Path) -> int:
    """Paired differences between two results folders, with intervals and p-values."""
    from coss_eval.reports.compare import compare as paired
    from coss_eval.reports.compare import text
    from coss_eval.terminal import say

    say(text(paired(a, b)))
    return 0


@app.command(name="list", group=LOOK)
def list_(kind: str | None = None) -> int:
    """What there is: datasets, corruptions, attacks, tasks, layouts, architectures."""
    from coss_eval.describe import list_lines
    from coss_eval.terminal import say

    say("\n".join(list_lines(kind)))
    return 0


@app.command(group=LOOK)
def info(what: str, *, data_root: Path | None = None, arch: str | None = None) -> int:
    """Describe a checkpoint (keys, architecture, head), a results folder (provenance) or a dataset."""
    from coss_eval.describe import describe
    from coss_eval.terminal import say

    say("\n".join(describe(what, data_root=data_root, arch=arch)))
    return 0


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Path | None = None,
    debug: bool = False,
) -> Any:
    """
    Parameters
    ----------
    config
        YAML file with values for any flag; a flag on the command line wins.
    debug
        Show tracebacks.
    """
    if config is not None and not config.is_file():
        raise UsageError(f"--config {config}: no such file")
    app.config = (Yaml(config, search_parents=False, use_commands_as_keys=False),) if config is not None else ()
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def main() -> None:
    """Entry point: one line for the person and exit code 2 for a wrong call, 1 for a failed run."""
    debug = "--debug" in sys.argv
    try:
        code = app.meta(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except (CossError, CycloptsError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        sys.stderr.write(f"coss-eval: {message}\n")
        code = 2 if isinstance(error, UsageError | CycloptsError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("coss-eval: stopped; what was done is stored, the same command goes on from there\n")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
