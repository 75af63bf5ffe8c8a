"""The command line: one short function a command; everything heavy is imported when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Yaml

from coss_eval import __version__
from coss_eval.errors import CossError, UsageError
from coss_eval.flags import CorruptionDataFlags, DataFlags, Fraction, Fractions, ModelFlags, RunFlags, TrainFlags

if TYPE_CHECKING:
    from coss_eval.evaluation import Plan
    from coss_eval.tasks.corruptions import Corruptions
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
    method: str,
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
        A named configuration (see coss-eval list presets) [default: a ResNet-18 for 100 epochs].
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

    from coss_eval.terminal import say, training_line

    overrides = (flags or TrainFlags()).given()
    for text in set_:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes field=value, got {text!r}")
        overrides[name] = yaml.safe_load(value)
    dataset, folder = (data or DataFlags()).open(), out or Path("runs") / method
    if dry_run:
        from coss_eval.training.dry_run import dry_run as cost

        say("\n".join(cost(method, dataset, preset=preset, device=device, **overrides).lines()))
        return 0
    from coss_eval.training.loop import train as run

    options: dict[str, Any] = {"preset": preset, "resume": resume, "device": device} | overrides
    with training_line(method) as on_progress:
        run(method, dataset, out=folder, on_progress=on_progress, on_note=say, **options)
    say(f"checkpoint  {folder / 'model.safetensors'}")
    return 0


@app.command(group=START)
def sweep(
    what: str,
    *,
    out: Path | None = None,
    data_root: Path | None = None,
    job: int | None = None,
    list_: Annotated[bool, Parameter(name="--list")] = False,
    device: str = "auto",
) -> int:
    """Train and probe a grid of runs from one YAML and plot accuracy by what was varied; the same call goes on.

    Parameters
    ----------
    what
        A YAML file, or a shipped sweep (see coss-eval list sweeps): data, preset, methods, grid, fixed, seeds.
    out
        Folder of the runs, their results and the report [default: runs/sweep-WHAT].
    data_root
        Where named datasets lie [env: COSS_DATA_ROOT].
    job
        Do this run only, by its number in --list: sbatch --array=1-20 ... --job $SLURM_ARRAY_TASK_ID
    list_
        Show the runs and how far they are, write the report on what is there, train nothing.
    """
    from coss_eval import sweep as sweeping
    from coss_eval.terminal import say, training_line

    chosen, folder = sweeping.read_sweep(what), out or Path("runs") / f"sweep-{Path(what).stem}"
    trials = sweeping.progress(chosen, folder)
    failures: list[str] = []
    if list_:
        for trial in trials:
            say(f"{trial.number:4d}  {trial.state:<9}{trial.name}")
        if folder.exists():
            sweeping.report(chosen, folder)
    else:
        failures = sweeping.run(
            chosen,
            folder,
            number=job,
            data_root=data_root,
            device=device,
            on_job=lambda one, what: say(f"[{one.number}/{len(trials)}] {one.name} {what}"),
            on_note=say,
            watch=training_line,
        )
    for failure in failures:
        say(f"NOT DONE    {failure}")
    if (folder / "report.md").exists():
        say(f"report      {folder / 'report.md'}")
    return 1 if failures else 0


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
def probe(
    *,
    protocol: Literal["lbfgs", "sgd"] = "lbfgs",
    epochs: int | None = None,
    lr: tuple[float, ...] = (),
    bf16: bool = False,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Linear probe, few-label probes and kNN on the frozen global representation; or the field's probe by SGD.

    Both protocols in one --out folder stand beside each other in its report, under names of their own.

    Parameters
    ----------
    protocol
        lbfgs: logistic regression to its optimum on features of the images as they are, with few labels too, and kNN.
        sgd: a linear layer trained by SGD on random resized crops and flips (batch 1024, momentum 0.9, cosine, no
        weight decay), its learning rate chosen on held-out training images, the last epoch scored.
    epochs
        Of sgd [default: 90].
    lr
        Learning rates of sgd for a batch of 256, trained side by side; one alone is trained on all training images
        (--lr 0.1 is MoCo v3's protocol) [default: ten from 0.001 to 30].
    bf16
        Run the network in bfloat16 on sgd's training views: faster on GPUs, and part of the protocol.
    """
    from coss_eval.probes.sgd import SgdProtocol
    from coss_eval.tasks.probe import Probe

    given: dict[str, Any] = ({"epochs": epochs} if epochs is not None else {}) | ({"lrs": lr} if lr else {})
    given |= {"precision": "bf16"} if bf16 else {}
    if given and protocol != "sgd":
        raise UsageError("--epochs, --lr and --bf16 belong to --protocol sgd; add it, or leave them out")
    task = Probe(protocol=protocol, sgd=SgdProtocol(**given))
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


@app.command(group=EVALUATE)
def corruptions(
    *,
    names: tuple[str, ...] = (),
    severities: tuple[int, ...] = (1, 2, 3, 4, 5),
    table: Literal["imagenet", "tiny-imagenet", "cifar"] | None = None,
    flavour: Literal["imagecorruptions", "imagenet-c"] = "imagecorruptions",
    backend: Literal["native", "reference"] = "native",
    write: Path | None = None,
    layout: Literal["npy", "folders"] | None = None,
    models: ModelFlags | None = None,
    data: CorruptionDataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Accuracy under the 19 image corruptions of ImageNet-C (or those in --names), at severities 1 to 5.

    Where --data is a ready-made benchmark (an ImageNet-C or Tiny-ImageNet-C folder, CIFAR-10-C's arrays), its files are
    read as they are; --clean then names the dataset it was made from.

    Parameters
    ----------
    write
        Evaluate nothing: write a corrupted copy of the test images into this folder; the same call goes on.
    layout
        Of the copy: npy as CIFAR-10-C, or folders of PNG files [default: npy for sets of one small size].
    """
    from coss_eval.corruptions.names import NAMES
    from coss_eval.tasks.corruptions import Corruptions

    task = Corruptions(names or tuple(NAMES), severities, backend, flavour, table)
    models, data, run = models or ModelFlags(), data or CorruptionDataFlags(), run or RunFlags()
    if write is not None:
        return _write_copy(write, layout, task, models, data, run)
    return _evaluate(models, data, run, [task])


def _write_copy(
    out: Path,
    layout: Literal["npy", "folders"] | None,
    task: Corruptions,
    models: ModelFlags,
    data: DataFlags,
    run: RunFlags,
) -> int:
    """The corrupted copy that --write asks for, in the geometry of --ckpt where one is given."""
    from dataclasses import replace

    from coss_eval.corrupted_copy import Copy, write_copy
    from coss_eval.evaluation import Progress
    from coss_eval.probes import resolve_device
    from coss_eval.terminal import progress_line, say

    dataset = data.open()
    if run.limit is not None:
        dataset = replace(dataset, test=dataset.test.limited(run.limit, run.seed))
    geometry = models.load()[0].preprocessing.geometry if models.ckpt else models.geometry()
    chosen = layout or ("npy" if dataset.test.native_size else "folders")
    copy = Copy(dataset, out, task, chosen, geometry, run.seed, resolve_device(run.device), run.batch_size)
    with progress_line(quiet=run.quiet) as show:
        written, there = write_copy(copy, None if show is None else lambda *now: show(Progress(*now)))
    say(f"{out}: {len(copy.split)} images, {written} corruptions written, {there} were there ({chosen})")
    return 0


@app.command(group=EVALUATE)
def attacks(
    *,
    eps: Fractions = None,
    eps_l2: Fractions = None,
    attack: tuple[str, ...] = (),
    target: Literal["label", "representation"] = "label",
    steps: int | None = None,
    step_size: Fraction = None,
    restarts: int = 1,
    loss: Literal["auto", "ce", "dlr", "ce+dlr"] = "auto",
    images: int = 1000,
    backend: Literal["native", "reference"] = "native",
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Robust accuracy under adversarial attacks over a rising list of eps, with gradient-masking flags.

    Parameters
    ----------
    eps
        Rising list in pixels of [0, 1]; 8/255 is understood.
    eps_l2
        The same for attacks in the Euclidean norm.
    attack
        NAME:NORM of fgsm, bim, pgd, apgd (linf, l2) and square (linf), or with --backend reference foolbox:NAME, any
        attack of foolbox [default: fgsm:linf, pgd:linf, pgd:l2].
    target
        representation moves the global representation as far as it can, without labels (PGD; linf and l2).
    steps
        Of each attack that takes them [default: pgd 20, bim 10, apgd 100, square 500 queries].
    step_size
        Of pgd and bim [default: 2.5 eps / steps].
    restarts
        Of pgd, apgd and square; an image counts as right if it stands in all.
    loss
        auto is ce with a network's own head, and through a linear probe the minimum over ce and dlr.
    images
        Attack so many test images (seeded, balanced over classes).
    """
    from coss_eval.tasks.attacks import L2_EPS, LINF_EPS, Attacks, named_attacks
    from coss_eval.tasks.representation import representation_attack

    lists = {"linf": eps or LINF_EPS, "l2": eps_l2 or L2_EPS} | ({"l1": eps, "l0": eps} if eps else {})
    shared: dict[str, Any] = {"eps": lists, "step_size": step_size, "restarts": restarts, "images": images}
    task: Task
    if target == "representation":
        task = representation_attack(named_attacks(attack), steps=steps, loss=loss, backend=backend, **shared)
    else:
        task = Attacks(named_attacks(attack), steps=steps, loss=loss, backend=backend, **shared)
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


@app.command(group=EVALUATE)
def internal(
    *,
    kinds: tuple[str, ...] = ("channel", "location"),
    sites: tuple[str, ...] = (),
    levels: tuple[float, ...] = (),
    seeds: int = 5,
    rescale: bool = False,
    match_locations: int | None = None,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Accuracy while the network is damaged inside: masked, made noisy, or unit after unit ablated.

    Parameters
    ----------
    kinds
        element, channel, location, noise, noise-shared, ablation, or all.
    sites
        stage1, stage2, ..., prepool, global [default: all but global].
    levels
        Rising: shares masked in [0, 1), of units ablated in [0, 1], or noise relative to the channels' deviation
        [default: those of each kind].
    seeds
        Masks an image.
    rescale
        Divide what is kept by the share that is kept.
    match_locations
        Before pooling, compare networks on so many locations an image: independent noise averages out over more.
    """
    from coss_eval.tasks.internal import Internal, named_kinds

    task = Internal(sites or None, named_kinds(kinds), levels or None, seeds, rescale, match_locations)
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


@app.command(group=EVALUATE)
def crops(
    *,
    areas: tuple[float, ...] = (0.08, 0.2, 0.4, 0.6, 0.8),
    positions: tuple[str, ...] = ("centre", "top left", "top right", "bottom left", "bottom right"),
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5),
    counts: tuple[int, ...] = (1, 2, 4, 8),
    area: float = 0.25,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
) -> int:
    """Accuracy and stability of the representation on crops of the test images.

    Parameters
    ----------
    areas
        Shares of the image's area that centre crops cover.
    positions
        Places of a crop of --area.
    scales
        Of the whole image, relative to the side of the network's input.
    counts
        Numbers of crops of --area at random places whose representations are averaged.
    area
        Of the crops whose position or number varies.
    """
    from coss_eval.tasks.crops import Crops

    task = Crops(areas, positions, scales, counts, area)
    return _evaluate(models or ModelFlags(), data or DataFlags(), run or RunFlags(), [task])


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


figures_app = App(name="figures", group=LOOK, default_parameter=Parameter(negative=()))
app.command(figures_app)


@figures_app.default
def figures(folder: Path, *, out: Path | None = None) -> int:
    """Draw the figures of a results folder as PDF and PNG."""
    from coss_eval.reports import figures as drawing
    from coss_eval.store import Store
    from coss_eval.terminal import say

    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; expected a results folder, or the words gallery or curves")
    for path in drawing.write(Store(folder), out or folder / "figures"):
        say(str(path))
    return 0


@figures_app.command
def gallery(
    *, image: Path | None = None, out: Path = Path("."), backend: Literal["native", "reference", "both"] = "native"
) -> int:
    """Draw one photograph under the 19 corruptions at five severities: gallery.png.

    image: any photograph [default: one of scikit-learn's]; backend: both sets imagecorruptions' beside ours.
    """
    from coss_eval.gallery import gallery as draw
    from coss_eval.terminal import say

    say(str(draw(out, image=image, backends=("native", "reference") if backend == "both" else (backend,))))
    return 0


@figures_app.command
def curves(*runs: Path, out: Path = Path(".")) -> int:
    """Draw the training curves of several runs' folders side by side: curves.png and curves.pdf."""
    from coss_eval.reports.curves import write
    from coss_eval.terminal import say

    if not runs:
        raise UsageError("curves of which runs? give their folders: coss-eval figures curves runs/byol runs/co-byol")
    for path in write(runs, out):
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
