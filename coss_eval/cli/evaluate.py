"""Commands that evaluate checkpoints: all of them plan, say so, run and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coss_eval.cli.app import EVALUATE, app
from coss_eval.cli.flags import (
    Backend,
    CorruptionDataFlags,
    DataFlags,
    Floats,
    Fraction,
    Fractions,
    Integers,
    ModelFlags,
    RunFlags,
    Words,
)
from coss_eval.errors import UsageError

if TYPE_CHECKING:
    from coss_eval.evaluation import Plan, Run
    from coss_eval.tasks.corruptions.task import Corruptions
    from coss_eval.tasks.task import Task


def _evaluate(
    models: ModelFlags | None,
    data: DataFlags | None,
    run: RunFlags | None,
    tasks: Sequence[str | Task],
    *,
    skip_impossible: bool = False,
) -> int:
    """Plan, say so, run, report: what every evaluating command does."""
    from coss_eval import evaluation
    from coss_eval.cli.terminal import progress_line, say
    from coss_eval.store import Store

    run = run or RunFlags()
    loaded = (models or ModelFlags()).load()
    dataset = (data or DataFlags()).open()
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
        allow_batch_dependent=run.allow_batch_dependent,
        skip_impossible=skip_impossible,
    )
    if not run.quiet or run.dry_run:
        _show_plan(planned, out)
    if run.dry_run:
        return 0
    with progress_line(quiet=run.quiet) as on_progress:
        done = evaluation.execute(
            planned, overwrite=run.overwrite, budget_hours=run.budget_hours, on_progress=on_progress
        )
    _say_gaps(done)  # before the report, which may find nothing to show
    if not Store(done.path).records():
        say(f"nothing was measured, so there is no report in {out}")
        return 1
    say("")
    say(_headline(done.path, run.baseline))
    say(f"\nreport      {out / 'report.md'}, report.html and, for every number, tables/*.csv")
    return 1 if done.failures else 0


def _say_gaps(done: Run) -> None:
    """A line for each cell that could not be measured, and why."""
    from coss_eval.cli.terminal import say

    for line in done.skipped:
        say(f"SKIPPED     {line}")
    for line in done.left_out:
        say(f"LEFT OUT    {line}")
    for failure in done.failures:
        say(f"NOT DONE    {failure}")


def _show_plan(planned: Plan, out: Path) -> None:
    from coss_eval.cli.terminal import duration, say

    for subject in planned.subjects:
        if subject.model.report is not None:
            say("\n".join(subject.model.report.lines()))
    say("\n".join(planned.lines()))
    say(f"out         {out}")
    seconds = planned.seconds()
    say(f"estimate    {'unknown: a network takes none of these images' if seconds is None else duration(seconds)}\n")


def _headline(path: Path, baseline: str | None) -> str:
    from coss_eval import reports
    from coss_eval.store import Store

    reports.write(path, baseline=baseline)
    return reports.headline_text(Store(path))


@app.command(group=EVALUATE)
def robustness(
    *,
    tasks: Words = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: Backend = "native",
) -> int:
    """Evaluate checkpoints with every task that the images allow, and write the report.

    Without a training split no probe can be fitted: checkpoints then need a head of their own for the dataset's
    classes, and the task probe is skipped, with a line that says so.

    Parameters
    ----------
    tasks
        Names from coss-eval list tasks [default: all].
    """
    return _evaluate(models, data, run, _made(tasks, backend), skip_impossible=True)


@app.command(group=EVALUATE)
def evaluate(
    *,
    tasks: Words = (),
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: RunFlags | None = None,
    backend: Backend = "native",
) -> int:
    """Evaluate checkpoints with the tasks named by --tasks (all by default).

    Parameters
    ----------
    tasks
        Names from coss-eval list tasks.
    """
    return _evaluate(models, data, run, _made(tasks, backend))


def _made(names: Sequence[str], backend: Backend) -> list[Task]:
    """The tasks of these names, all where there are none."""
    from coss_eval.tasks import NAMES, task_class

    chosen = [task_class(name) for name in names or NAMES]
    return [task(backend=backend) if "backend" in task.__dataclass_fields__ else task() for task in chosen]  # type: ignore[attr-defined, call-arg]


@app.command(group=EVALUATE)
def probe(
    *,
    protocol: Literal["lbfgs", "sgd"] = "lbfgs",
    epochs: int | None = None,
    lr: Floats = (),
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
    from coss_eval.tasks.probe.task import Probe

    given: dict[str, Any] = ({"epochs": epochs} if epochs is not None else {}) | ({"lrs": lr} if lr else {})
    given |= {"precision": "bf16"} if bf16 else {}
    if given and protocol != "sgd":
        raise UsageError("--epochs, --lr and --bf16 belong to --protocol sgd; add it, or leave them out")
    task = Probe(protocol=protocol, sgd=SgdProtocol(**given))
    return _evaluate(models, data, run, [task])


@app.command(group=EVALUATE)
def corruptions(
    *,
    names: Words = (),
    severities: Integers = (1, 2, 3, 4, 5),
    table: Literal["imagenet", "tiny-imagenet", "cifar"] | None = None,
    flavour: Literal["imagecorruptions", "imagenet-c"] = "imagecorruptions",
    backend: Backend = "native",
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
    names
        Names from coss-eval list corruptions [default: all 19].
    severities
        Of each corruption, 1 (mildest) to 5.
    table
        The images whose published severities are used [default: by the side of the images].
    flavour
        Which to follow where the package imagecorruptions and ImageNet-C's original code differ.
    write
        Evaluate nothing: write a corrupted copy of the test images into this folder; the same call goes on.
    layout
        Of the copy: npy as CIFAR-10-C, or folders of PNG files [default: npy for sets of one small size].
    """
    from coss_eval.corruptions.names import NAMES
    from coss_eval.tasks.corruptions.task import Corruptions

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

    from coss_eval.cli.terminal import progress_line, say
    from coss_eval.evaluation import Progress
    from coss_eval.probes import resolve_device
    from coss_eval.tasks.corruptions.write import Copy, write_copy

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
    attack: Words = (),
    target: Literal["label", "representation"] = "label",
    steps: int | None = None,
    step_size: Fraction = None,
    restarts: int = 1,
    loss: Literal["auto", "ce", "dlr", "ce+dlr"] = "auto",
    images: int = 1000,
    backend: Backend = "native",
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
    from coss_eval.tasks.attacks.representation import representation_attack
    from coss_eval.tasks.attacks.task import L2_EPS, LINF_EPS, Attacks, named_attacks

    lists = {"linf": eps or LINF_EPS, "l2": eps_l2 or L2_EPS} | ({"l1": eps, "l0": eps} if eps else {})
    shared: dict[str, Any] = {"eps": lists, "step_size": step_size, "restarts": restarts, "images": images}
    task: Task
    if target == "representation":
        task = representation_attack(named_attacks(attack), steps=steps, loss=loss, backend=backend, **shared)
    else:
        task = Attacks(named_attacks(attack), steps=steps, loss=loss, backend=backend, **shared)
    return _evaluate(models, data, run, [task])


@app.command(group=EVALUATE)
def internal(
    *,
    kinds: Words = ("channel", "location"),
    sites: Words = (),
    levels: Fractions = None,
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
    from coss_eval.tasks.internal.task import Internal, named_kinds

    task = Internal(sites or None, named_kinds(kinds), levels, seeds, rescale, match_locations)
    return _evaluate(models, data, run, [task])


@app.command(group=EVALUATE)
def crops(
    *,
    areas: Floats = (0.08, 0.2, 0.4, 0.6, 0.8),
    positions: Words = ("centre", "top left", "top right", "bottom left", "bottom right"),
    scales: Floats = (0.25, 0.5, 0.75, 1.5),
    counts: Integers = (1, 2, 4, 8),
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
    from coss_eval.tasks.crops.task import Crops

    task = Crops(areas, positions, scales, counts, area)
    return _evaluate(models, data, run, [task])


@app.command(group=EVALUATE)
def redundancy(*, models: ModelFlags | None = None, data: DataFlags | None = None, run: RunFlags | None = None) -> int:
    """How alike the local representations of an image are, beside an untrained network's."""
    return _evaluate(models, data, run, ["redundancy"])
