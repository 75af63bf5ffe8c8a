"""Commands that look at results and inputs, and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from coss_eval.cli.app import LOOK, RUN, app
from coss_eval.cli.flags import Chosen, DataFlags, ModelFlags, OfData, OfRun, OfTask
from coss_eval.errors import UsageError
from coss_eval.tasks.flags import Fractions, Words


@app.command(group=LOOK)
def report(
    *folders: Path,
    baseline: str | None = None,
    label: Chosen = (),
    models: Chosen = (),
    rename: Chosen = (),
    style: Literal["plain", "neurips", "cvpr"] = "plain",
    out: OfRun[Path | None] = None,
) -> int:
    """Write report.md, report.html, tables and figures again; of several results folders, a leaderboard.

    Parameters
    ----------
    folders
        A results folder; or several, or a folder with several inside: one page with a table a protocol, and ranks.
    baseline
        Name of the model or method that the differences refer to [default: the first].
    label
        Runs of one method: "CO-BYOL (ours)=runs/co-*/model.safetensors", or their names; repeat it for other methods.
    models
        Names, or globs such as 'co-*', of the models and methods to show, in this order; p-values and ranks stay those
        among all [default: all].
    rename
        "OLD=NEW": another name for a model or method; the other flags take both.
    style
        Of the LaTeX tables: the widths of an article, NeurIPS or CVPR.
    out
        Folder to write into [default: the results folder; of a leaderboard results/leaderboard].
    """
    from coss_eval import reports
    from coss_eval.reports.folders import renames, results_folders
    from coss_eval.reports.groups import given
    from coss_eval.runtime.live import say

    if not folders:
        raise UsageError("a report on what? give a results folder, or several for a leaderboard")
    groups, names, found = given(label), renames(rename), results_folders(folders)
    if len(found) == 1:
        paths = reports.write(
            found[0], out=out, baseline=baseline, groups=groups, models=models, rename=names, style=style
        )
    else:
        if baseline is not None:
            raise UsageError("a leaderboard has no baseline: leave --baseline out, or give one results folder")
        paths = reports.write_leaderboard(found, out, groups=groups, models=models, rename=names)
    for path in sorted(paths, key=lambda path: path.suffix == ".html"):  # the page last
        say(str(path))
    return 0


figures_app = App(
    name="figures", group=LOOK, default_parameter=Parameter(negative=()), suppress_keyboard_interrupt=False
)
app.command(figures_app)


@figures_app.default
def figures(
    folder: Path,
    *,
    only: Words = (),
    width: str | None = None,
    format: Words = ("pdf", "png"),
    models: Words = (),
    baseline: str | None = None,
    label: Chosen = (),
    out: Path | None = None,
) -> int:
    """Draw the figures of a results folder, as wide as they are printed.

    Parameters
    ----------
    folder
        A results folder.
    only
        Names of figures, such as corruptions_mean,redundancy_distance [default: all that the folder has].
    width
        Width in print: 3.3in (or 3.3), 84mm, 8.4cm or 240pt [default: each figure's own, at most 7 in].
    format
        Kinds of files: pdf, svg, png.
    models
        Names of the models or methods to show [default: all].
    baseline
        Name of the model or method that the differences refer to [default: the first].
    label
        Runs of one method: "CO-BYOL (ours)=runs/co-*/model.safetensors", or their names; repeat it for other methods.
    out
        Where to write them [default: the folder's figures/].
    """
    from coss_eval.reports import figures as drawing
    from coss_eval.reports.folders import own_folder
    from coss_eval.reports.groups import given
    from coss_eval.reports.results import Results
    from coss_eval.runtime.live import say
    from coss_eval.store import Store

    if not Store(folder).is_there():
        raise UsageError(
            f"there is no folder {folder}; expected a results folder, or the words gallery, adversarial or curves"
        )
    place = out or own_folder(Store(folder)) / "figures"
    results = Results(Store(folder), given(label))
    canvas = drawing.canvas_of(results, width=_inches(width), models=models, baseline=baseline)
    wanted, kinds = (",".join(words).split(",") if words else () for words in (only, format))
    paths = drawing.write(results, place, only=wanted, canvas=canvas, kinds=kinds)
    if not paths:
        raise UsageError(f"there is nothing to draw in {folder}; give a results folder that coss-eval has written")
    for path in paths:
        say(str(path))
    return 0


def _inches(width: str | None) -> float | None:
    """A width such as 3.3in, 84mm, 8.4cm, 240pt or 3.3 in inches. Raises UsageError for anything else."""
    if width is None:
        return None
    number, unit = width.strip(), "in"
    for unit in ("in", "mm", "cm", "pt", ""):
        if number.endswith(unit):
            number = number.removesuffix(unit)
            break
    try:
        return float(number) / {"in": 1, "mm": 25.4, "cm": 2.54, "pt": 72.27, "": 1}[unit]
    except ValueError:
        raise UsageError(f"expected --width such as 3.3in, 84mm or 240pt, got {width!r}") from None


@figures_app.command
def gallery(
    *, image: Path | None = None, out: Path = Path("."), backend: Literal["native", "reference", "both"] = "native"
) -> int:
    """Draw one photograph under all corruptions at all severities: gallery.png.

    Parameters
    ----------
    image
        Any photograph [default: one of scikit-learn's].
    out
        Folder to write into.
    backend
        reference is imagecorruptions; both sets its images beside ours.
    """
    from coss_eval.reports.gallery import gallery as draw
    from coss_eval.runtime.live import say

    say(str(draw(out, image=image, backends=("native", "reference") if backend == "both" else (backend,))))
    return 0


@figures_app.command
def adversarial(
    *,
    eps: Fractions = None,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    images: int = 4,
    width: str | None = None,
    format: Words = ("pdf", "png"),
    model: ModelFlags | None = None,
    data: DataFlags | None = None,
    seed: int = 0,
    device: str = "auto",
    out: Path = Path("."),
) -> int:
    """Draw test images under PGD beside what the network takes them for: adversarial_NAME.png and .pdf.

    Parameters
    ----------
    eps
        Sizes of the perturbation [default: 1/255 4/255].
    norm
        Norm of eps.
    steps
        Steps of PGD.
    images
        Number of images, the first that are classified rightly.
    width
        Width in print: 3.3in (or 3.3), 84mm, 8.4cm or 240pt [default: 7 in].
    format
        Kinds of files: pdf, svg, png.
    seed
        Seed of the images and of the starts.
    device
        cpu, cuda, mps or auto.
    out
        Folder to write into.
    """
    from coss_eval.reports.drawing import WIDTH, save, style
    from coss_eval.reports.gallery import attacked, draw_attacked
    from coss_eval.runtime.live import say

    dataset = (data or DataFlags()).open()
    for one in (model or ModelFlags()).load():
        found = attacked(
            one, dataset, eps=eps or (1 / 255, 4 / 255), norm=norm, steps=steps, images=images, seed=seed, device=device
        )
        with style():
            figure = draw_attacked(found, width=_inches(width) or WIDTH)
            name = f"adversarial_{one.name}".replace("/", "-")
            for path in save(figure, out / name, ",".join(format).split(",")):
                say(str(path))
    return 0


@figures_app.command
def curves(*runs: Path, width: str | None = None, format: Words = ("pdf", "png"), out: Path = Path(".")) -> int:
    """Draw the training curves of several runs' folders side by side, seeds of one method as a band: curves.png, .pdf.

    Parameters
    ----------
    runs
        Folders that coss-eval train wrote, or a sweep's folder for all runs in it.
    width
        Width in print: 3.3in (or 3.3), 84mm, 8.4cm or 240pt [default: 7 in].
    format
        Kinds of files: pdf, svg, png.
    out
        Folder to write into.
    """
    from coss_eval.reports.curves import write
    from coss_eval.reports.drawing import Canvas
    from coss_eval.runtime.live import say

    if not runs:
        raise UsageError("curves of which runs? give their folders: coss-eval figures curves runs/byol runs/co-byol")
    for path in write(runs, out, Canvas(_inches(width)), ",".join(format).split(",")):
        say(str(path))
    return 0


@app.command(group=LOOK)
def compare(
    a: Path,
    b: Path,
    *,
    out: OfRun[Path | None] = None,
    force: bool = False,
    label: Chosen = (),
    models: Chosen = (),
    rename: Chosen = (),
) -> int:
    """Differences between two models or methods of any results folders, with intervals and p-values.

    Parameters
    ----------
    a
        A results folder, or FOLDER::MODEL for a model or method of it, or a glob such as FOLDER::'co-*'.
    b
        Another, of the same images; or another model of the same folder.
    out
        Folder for the comparison: a page, its tables and a figure.
    force
        Compare in spite of different images or protocols; warnings name them.
    label
        Runs of one method: "CO-BYOL (ours)=runs/co-*/model.safetensors", or their names; repeat it for other methods.
    models
        Names, or globs such as 'co-*', of the models and methods to show, in this order [default: all that pair].
    rename
        "OLD=NEW": another name for a model or method; the other flags take both.
    """
    from coss_eval.reports.compare import compare as differences
    from coss_eval.reports.compare import text, write
    from coss_eval.reports.folders import renames
    from coss_eval.reports.groups import given
    from coss_eval.runtime.live import coloured, say, width

    found = differences(a, b, force=force, groups=given(label), models=models, rename=renames(rename))
    say(text(found, width(), coloured=coloured()))
    for path in [] if out is None else write(found, out):
        say(str(path))
    return 0


@app.command(group=LOOK)
def claim(what: str, *, results: Path, size: str | None = None) -> int:
    """Whether claims that were written down beforehand hold: supported, refuted or undecided, over training seeds.

    Parameters
    ----------
    what
        A YAML of claims, each with name, source, task, metric, margin and, where needed, where, contrast, percent and
        data; or a sweep with claims, shipped or a file.
    results
        Folder of the sweep that it is, or a results folder with the runs of the methods.
    size
        One of the sizes that a sweep's YAML has.
    """
    from coss_eval.reports.claims import claim_lines
    from coss_eval.runtime.live import say
    from coss_eval.sweeps.report import judge

    say("\n".join(claim_lines(*judge(what, results, size))))
    return 0


@app.command(group=LOOK)
def consistency(*folders: Path, out: Path | None = None) -> int:
    """Whether networks fail on the same images: Cohen's kappa of their stored verdicts, with intervals.

    Parameters
    ----------
    folders
        Results folders; every two checkpoints in them are compared.
    out
        A CSV file for every condition's kappa, agreement and interval.
    """
    from coss_eval.reports.consistency import consistency as of_folders
    from coss_eval.reports.consistency import text
    from coss_eval.reports.files import write_file
    from coss_eval.runtime.live import say, width

    found = of_folders(*folders)
    say(text(found, width()))
    if out is not None:
        say(f"\n{write_file(out, found.to_csv(index=False, lineterminator=chr(10)))}")
    return 0


@app.command(group=LOOK)
def relate(
    *folders: Path,
    x: str = "redundancy",
    y: str = "corruptions",
    family: Literal["arch", "folder", "none"] = "arch",
    out: Path | None = None,
) -> int:
    """One headline score against another over models: a scatter, and rank correlations within families.

    Parameters
    ----------
    folders
        Results folders, or folders with results folders inside; three models or more in all.
    x
        A column of the headline, or a task, whose first column it then is.
    y
        Another one.
    family
        Which models are of one family: those of an architecture, of a folder, or all.
    out
        Folder for the page, the figure and the numbers [default: results/relate-X-Y].
    """
    from coss_eval.evaluation import relate as related
    from coss_eval.runtime.live import say, say_report, width

    found = related(folders, x, y, family=family)
    say(found.text(width()) + "\n")
    folder = out or Path("results") / f"relate-{x}-{y}".replace("/", "-").replace(" ", "-")
    found.write(folder)
    say_report(folder / "report.md", "report.html, figures/relate.png, relate.csv and correlations.csv")
    return 0


@app.command(group=LOOK)
def pack(*folders: Path) -> int:
    """Pack results folders into three files each, the finished runs in a folder into one; all is read as before.

    Parameters
    ----------
    folders
        Results folders, written by any version, and folders with runs of sweep or train in them, which go into its
        runs.zip; weights stay where they are.
    """
    from coss_eval.runtime.live import say
    from coss_eval.sweeps.packing import has_runs, pack_runs

    if not folders:
        raise UsageError("pack which runs? give their folders: coss-eval pack results/a results/b")
    declined = 0
    for folder in folders:
        if has_runs(folder):
            reasons = pack_runs(folder)
            left = {name: reason for name, reason in reasons.items() if reason is not None}
            say(f"{folder}: {len(reasons) - len(left)} runs packed")
            for name, reason in left.items():
                say(f"{folder / name}: NOT PACKED: {reason}")
        else:
            declined += not _pack_cells(folder)
    return 1 if declined else 0


def _pack_cells(folder: Path) -> bool:
    """Pack one results folder and say so; whether it was done."""
    from coss_eval.runtime.live import say
    from coss_eval.store import Store

    store = Store(folder)
    cells = len(store.records())
    if not cells:
        raise UsageError(f"no finished cells in {folder}; give a results folder that coss-eval has evaluated into")
    reason = store.pack()
    say(f"{folder}: {cells} cells " + ("packed" if reason is None else f"NOT PACKED: {reason}"))
    return reason is None


@app.command(name="list", group=LOOK)
def list_(kind: str | None = None) -> int:
    """What there is: of all kinds, or of one.

    Parameters
    ----------
    kind
        tasks, datasets, corruptions, attacks, architectures, methods, layouts, data-layouts, presets or sweeps
        [default: all].
    """
    from coss_eval.cli.describe import list_lines
    from coss_eval.runtime.live import say

    for line in list_lines(kind):
        say(line)
    return 0


@app.command(group=LOOK)
def info(what: str, *, data_root: Path | None = None, arch: str | None = None) -> int:
    """Describe a checkpoint (keys, architecture, head), a results folder (provenance) or a dataset.

    Parameters
    ----------
    what
        A file, a folder, or a name that --ckpt or --data takes.
    data_root
        Where named datasets lie [env: COSS_DATA_ROOT].
    arch
        Architecture of the checkpoint, where the file does not tell.
    """
    from coss_eval.cli.describe import describe
    from coss_eval.runtime.live import say

    say("\n".join(describe(what, data_root=data_root, arch=arch)))
    return 0


@app.command(name="receptive-field", group=LOOK)
def receptive_field(
    *,
    model: ModelFlags | None = None,
    size: OfTask[int | None] = None,
    limit: Annotated[int, Parameter(name=["--limit", "--images"], group=RUN)] = 64,
    data: OfData[str | None] = None,
    data_root: OfData[Path | None] = None,
    out: OfRun[Path | None] = None,
) -> int:
    """How many pixels a unit sees at each site: in theory, and effectively where --data gives images.

    Of checkpoints (--ckpt), or of --arch alone, say rf29_resnet18.

    Parameters
    ----------
    size
        Side of the image in pixels [default: that of the images].
    limit
        Number of test images to use for the effective field (seeded, balanced over classes).
    data
        A name (see coss-eval list) or a folder: images for the effective field [default: in theory alone].
    data_root
        Where named datasets lie [env: COSS_DATA_ROOT].
    out
        Folder for pictures of the effective fields, with the theoretical ones as boxes, and the maps as arrays.
    """
    from coss_eval.cli.describe import field_lines, write_field_pictures
    from coss_eval.runtime.live import say

    model = model or ModelFlags()
    if out is not None and data is None:
        raise UsageError("pictures are of the effective field, which needs images: give --data")
    for one in model.load() if model.ckpt else [model.make()]:
        say("\n".join(field_lines(one, size=size, data=data, data_root=data_root, images=limit)) + "\n")
        if out is not None and data is not None:
            for path in write_field_pictures(one, data=data, data_root=data_root, images=limit, out=out):
                say(str(path))
    return 0
