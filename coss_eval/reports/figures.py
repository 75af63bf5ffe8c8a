"""The figures of a results folder: what the tasks in it draw, and what is drawn of all of it, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports import curves, headline, sweeps
from coss_eval.reports.by_task import task_report
from coss_eval.reports.differences import forest
from coss_eval.reports.drawing import KINDS, MANY, WHOLE, WIDTH, Canvas, save, settle, style
from coss_eval.reports.estimates import difference
from coss_eval.reports.layout import Number, Row
from coss_eval.reports.results import Results
from coss_eval.reports.saliency import stored_fields
from coss_eval.reports.scores import Comparisons, comparable
from coss_eval.store import Store

Maker = Callable[[Results, Canvas], Figure | None]


def makers(results: Results) -> dict[str, tuple[Maker, str]]:
    """What can be drawn of a folder, with its caption, by name; a maker gives None where something is missing."""
    found: dict[str, tuple[Maker, str]] = {}
    for task in results.tasks:
        found |= task_report(task).figures
    return found | OF_ALL


def draw(results: Results, name: str, canvas: Canvas = WHOLE) -> Figure:
    """One figure. Raises UsageError for a name that the folder has no figure of, naming those that it has."""
    known = makers(results)
    figure = _made(results, known[name][0], canvas) if name in known else None
    if figure is not None:
        return figure
    with style():
        there = [other for other, (maker, _) in known.items() if other != name and maker(results, canvas) is not None]
    if name not in known:
        raise unknown_name("figure", name, there)
    raise UsageError(f"{results.store.path} lacks what {name} is drawn from; it has {', '.join(there) or 'no figure'}")


def write(
    store: Store | Results,
    out: Path,
    *,
    only: Sequence[str] = (),
    canvas: Canvas = WHOLE,
    kinds: Sequence[str] = ("png", "pdf"),
    renew: bool = False,
) -> list[Path]:
    """Draw what the store allows, or ``only`` some figures, under ``out``; the paths written.

    ``renew``: also of any further kind that lies there already, so that no old figure stays beside a new one. Raises
    UsageError for unknown names and kinds of files, before anything is written.
    """
    results = store if isinstance(store, Results) else Results(store)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("format", kind, KINDS)
    figures = {name: draw(results, name, canvas) for name in only} or {
        name: figure
        for name, (maker, _) in makers(results).items()
        if (figure := _made(results, maker, canvas)) is not None
    }
    with style():
        return [
            path
            for name, figure in figures.items()
            for path in save(figure, out / name, [*kinds, *(_others(out / name, kinds) if renew else ())])
        ]


def _others(stem: Path, kinds: Sequence[str]) -> list[str]:
    """The further kinds of files that a figure has."""
    return [kind for kind in KINDS if kind not in kinds and stem.with_name(f"{stem.name}.{kind}").exists()]


def canvas_of(
    results: Results, *, width: float | None = None, models: Sequence[str] = (), baseline: str | None = None
) -> Canvas:
    """A canvas from what a person says. Raises UsageError for unknown names and a width that holds nothing."""
    if width is not None and not NARROWEST <= width <= WIDEST:
        raise UsageError(f"a width from {NARROWEST:g} to {WIDEST:g} inches was expected, got {width:g}")
    labels = tuple(results.named(name, "model") for name in models)
    base = results.named(baseline, "baseline") if baseline is not None else None
    return Canvas(width, labels, base)


NARROWEST, WIDEST = 2.0, 20.0  # inches


def _made(results: Results, maker: Maker, canvas: Canvas) -> Figure | None:
    with style():
        figure = maker(results, canvas)
        return None if figure is None else settle(figure)


def differences(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """Every headline score's difference from the baseline with its interval and the p of its table."""
    columns = comparable(headline.columns(results), results.family)
    shown = canvas.shown(results.labels)
    base = canvas.baseline or next(iter(shown), "")
    others = [label for label in shown if label != base][:MANY]
    family = Comparisons(columns, results.family)
    rows = []
    for column in columns:
        for other in others:
            found = difference(column.of(other), column.of(base))
            if found is not None:
                p = family.p(column, other, base)
                number = Number(*found[:3], column.unit, p, signed=True, lower_is_better=column.lower_is_better)
                rows.append(Row(other, [number], column.name))
    return forest(rows, width=canvas.inches(WIDTH), xlabel=f"difference from {base}") if rows else None


def training_curves(folder: Path, canvas: Canvas = WHOLE) -> Figure | None:
    """The curves of the training runs that lie in a folder; None without any."""
    inside = curves.logs(folder)
    return curves.draw([curves.read(path) for path in inside], canvas) if inside else None


def redundancy_robustness(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """Redundancy against accuracy under corruptions, where three models or more have both."""
    from coss_eval.reports.relate import FEWEST, scatter_of  # here: it draws itself, and pages are made of figures

    trained = [label for label in results.labels if label not in results.untrained]
    if len(trained) < FEWEST or not {"redundancy", "corruptions"} <= set(results.tasks):
        return None
    try:
        return scatter_of(results, "redundancy", "corruptions", canvas)
    except UsageError:  # the tasks are there, but too few models have both of the headline's scores
        return None


OF_ALL: dict[str, tuple[Maker, str]] = {
    "forest": (
        differences,
        "Differences from the baseline on the headline's scores. Bars: 95 %; filled: p < .05 after Holm's adjustment "
        f"over the headline. At most {MANY} models.",
    ),
    "redundancy_robustness": (
        redundancy_robustness,
        "Redundancy before pooling against robustness; a point a model, bars: 95 % over images.",
    ),
    "sweep": (
        lambda results, canvas: sweeps.stored_figure(results.store.path, canvas),
        "Linear-probe accuracy by what the sweep varied. Bands: 95 % over seeds where a setting has several, else over "
        "images.",
    ),
    "training_curves": (
        lambda results, canvas: training_curves(results.store.path, canvas),
        "Training curves. A method of several seeds is their mean, with a band from the lowest to the highest.",
    ),
    "receptive_fields": (
        lambda results, canvas: stored_fields(results.store.path, canvas),
        "Effective receptive fields (colour: square root of the mean absolute gradient; white: the level of the "
        "effective size; dashed: the theoretical field).",
    ),
}
