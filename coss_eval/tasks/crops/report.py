"""What a report shows of crops: accuracy and stability by area, position, resolution and number of crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from coss_eval.reports.drawing import WHOLE, Canvas, Figure, chance_in, legend, line, looks_in, marks, percent
from coss_eval.reports.estimates import Estimate, kept
from coss_eval.reports.layout import Unit
from coss_eval.reports.results import Results
from coss_eval.reports.scores import KEPT, Column, Of, Score, TaskScores, mean_of
from coss_eval.reports.task_report import TaskReport

TASK = "crops"
AREA = 0.2  # of the image, in the headline: the smallest training crops of most recipes lie below it


class Family(NamedTuple):
    """What varies in a family of crops, and how tables and figures call it."""

    varied: str
    heading: str
    axis: str


FAMILIES = {
    "area": Family("area", "centre crops, share of the image's area", "crop, share of the area"),
    "position": Family("position", "position of the crop", "position of the crop"),
    "resolution": Family("scale", "whole image, share of the input's side", "scale of the image"),
    "pooled": Family("crops", "number of crops pooled", "crops pooled"),
}


def scores(results: Results) -> list[TaskScores]:
    """Accuracy by what varies (area, position, resolution, number of pooled crops), then the stability likewise."""
    rows = []
    metrics: dict[str, tuple[str, Unit]] = {
        "accuracy": ("accuracy", "percent"),
        "stability": ("cosine with the full image", "plain"),
    }
    for metric, (what, unit) in metrics.items():
        for name, family in FAMILIES.items():
            for value, of in along(results, name, metric):
                shown = value if isinstance(value, str) else f"{value:g}"
                rows.append(Score(shown, of, unit, f"{what}: {family.heading}"))
    caption = (
        "Crops keep the image's shape and are resized to the network's input. Cosine: between the global "
        "representations of the crop and of the full image, the mean over the full images subtracted."
    )
    return [TaskScores(TASK, "Crops of the test images", "accuracy %, or cosine", rows, caption)]


def along(results: Results, family: str, metric: str) -> list[tuple[float | str, Of]]:
    """One metric for each value of what varies in a family of crops, in the order of the axis."""
    name = FAMILIES[family].varied
    values = dict.fromkeys(condition[name] for condition in results.conditions(TASK, metric, family=family))

    def of(value: float | str) -> Of:
        found = results.conditions(TASK, metric, **{"family": family, name: value})
        return mean_of(results, TASK, metric, found)

    return [(value, of(value)) for value in (values if family == "position" else sorted(values))]


def by_family(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """Accuracy above, cosine with the full image below; a column a family: area, position, resolution, pooled.

    Where the figure is narrow, families go on in further rows.
    """
    families = [family for family in FAMILIES if along(results, family, "accuracy")]
    look = looks_in(results, TASK, canvas)
    if not families or not look:
        return None
    width = canvas.inches(1 + 1.5 * len(families))
    columns = max(1, min(len(families), int((width - 0.4) / 1.35)))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(width, 3.3 * rows + 0.5), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for place, family in enumerate(families):
        row, column = divmod(place, columns)
        pair = axes[2 * row : 2 * row + 2, column]
        for axis, metric in zip(pair, ("accuracy", "stability"), strict=True):
            points = along(results, family, metric)
            x = _crop_axis(axis, family, [value for value, _ in points])
            for number, label in enumerate(look):
                draw, beside = (marks, 0.12 * number) if family == "position" else (line, 0.0)
                scale = 100 if metric == "accuracy" else 1
                draw(axis, [at + beside for at in x], [of(label) for _, of in points], look[label], scale=scale)
        pair[0].tick_params(labelbottom=False)
        pair[1].set_xlabel(FAMILIES[family].axis)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    percent(axes[::2].flat, chance_in(results, look))
    _alike([*axes[1::2].flat])
    for row in range(2 * rows):
        axes[row, 0].set_ylabel("cosine with the full image" if row % 2 else "accuracy, %")
        for axis in axes[row, 1:]:
            axis.tick_params(labelleft=False)
    legend(figure, look)
    return figure


def _alike(axes: Sequence[Axes]) -> None:
    """One scale for all that have data."""
    limits = [axis.get_ylim() for axis in axes if axis.has_data()]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _crop_axis(axis: Axes, family: str, values: Sequence[float | str]) -> Sequence[float]:
    """Where the values stand on the axis, which is labelled there."""
    if family == "position":
        axis.set_xticks(range(len(values)), ["".join(word[0].upper() for word in str(v).split()) for v in values])
        return range(len(values))
    x = [float(value) for value in values]
    if family == "area":
        axis.xaxis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    return x


def headline(results: Results) -> list[Column]:
    """The share of the full images' accuracy above chance kept on centre crops of AREA of their area."""

    def share(label: str) -> Estimate | None:
        part, whole = (results.estimate(label, TASK, "accuracy", family="area", area=area) for area in (AREA, 1.0))
        return kept(part, whole, results.chance(label))

    return [Column(f"kept, {100 * AREA:g} % crop", share, terms={"kept": KEPT, "crop": "in the centre, by area"})]


REPORT = TaskReport(
    scores=scores,
    figures={"crops": (by_family, "Accuracy and cosine with the full image on crops of the test images. Bands: 95 %.")},
    headline=headline,
)
