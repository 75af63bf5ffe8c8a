"""One headline score against another over models: a scatter, and rank correlations within families. Imports no torch.

The model is the unit. Networks of several families make clusters, and two clusters make a fine correlation whatever
is true within them, so correlations are taken within families; no score is partialled out on some twenty points.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports import headline, html, layout, markdown
from coss_eval.reports.by_task import task_report
from coss_eval.reports.document import Document, Section
from coss_eval.reports.drawing import (
    WHOLE,
    Canvas,
    Figure,
    Look,
    legend,
    looks,
    looks_of,
    name_points,
    save,
    settle,
    style,
)
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.files import write_file
from coss_eval.reports.folders import results_folders
from coss_eval.reports.groups import differing
from coss_eval.reports.layout import Number, Row, Table, Unit, broken
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, explained
from coss_eval.store import Record, Store

FEWEST = 3  # models, of which ranks can say anything
NAMED = 24  # models whose names find room beside their points
FEW = 8  # below it an interval over models is a sketch
RESAMPLES = 2000
CLEAN = ("clean top-1", "linear probe")  # the accuracy shown beside: the first that a model has
WHAT_FOLLOWS = (
    "Where a network hands on the mean of its locations, mixing every location with its image's mean drives redundancy "
    "to 1 and changes no result under image corruptions or attacks: redundancy before pooling by itself explains "
    "damage inside the network at most."
)

FamilyBy = Literal["arch", "folder", "none"]
Reals1D = NDArray[np.float64]


class LocationFacts(NamedTuple):
    """The locations before pooling: theoretical receptive field in pixels (inf: the whole image) and their number."""

    receptive_field: float
    number: int


LocationFactsOf = Callable[
    [Mapping[str, Any], int], "LocationFacts | None"
]  # of a model's protocol at images of so many pixels


@dataclass(frozen=True)
class Related:
    """One model with both scores, and what stands beside them."""

    name: str
    family: str
    x: Estimate
    y: Estimate
    clean: Estimate | None
    locations: LocationFacts | None


class RankCorrelation(NamedTuple):
    """Spearman's coefficient of ``n`` models in ``families`` with its interval over models, NaN where there is none."""

    name: str
    families: int
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Relation:
    """Two headline scores, ``x`` and ``y``, over models."""

    x: Column
    y: Column
    models: tuple[Related, ...]
    correlations: tuple[RankCorrelation, ...]
    warnings: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """One row a model: model, family, x, x_low, x_high, y, y_low, y_high, clean, receptive_field, locations, n."""
        rows = []
        for m in self.models:
            place = m.locations or LocationFacts(math.nan, 0)
            row: dict[str, Any] = {"model": m.name, "family": m.family}
            row |= {"x": m.x.value, "x_low": m.x.low, "x_high": m.x.high}
            row |= {"y": m.y.value, "y_low": m.y.low, "y_high": m.y.high}
            row |= {"clean": None if m.clean is None else m.clean.value, "receptive_field": place.receptive_field}
            rows.append(row | {"locations": place.number or None, "n": min(m.x.n, m.y.n)})
        return pd.DataFrame(rows)

    def ranks(self) -> pd.DataFrame:
        """One row a correlation: name, families, n (models), value, low, high."""
        return pd.DataFrame(self.correlations)

    def plot(self, *, width: float | None = None) -> Figure:
        """A point a model, in its family's look, with the intervals over images; ``width`` in inches, as printed."""
        with style():
            return settle(_scatter(self, width))

    def text(self, width: int | None = None) -> str:
        """The warnings and both tables for a terminal."""
        lines = [f"WARNING  {line}" for line in self.warnings]
        return "\n\n".join([*lines, *(layout.text(table, width) for table in self._tables())])

    def write(self, out: str | os.PathLike[str]) -> list[Path]:
        """relate.csv, correlations.csv, figures/, report.md and report.html in the folder ``out``; the paths."""
        folder = Path(out)
        paths = [write_file(folder / "relate.csv", self.table().to_csv(index=False, lineterminator="\n"))]
        paths.append(write_file(folder / "correlations.csv", self.ranks().to_csv(index=False, lineterminator="\n")))
        with style():
            paths += save(self.plot(), folder / "figures" / "relate")
        pictures = {path.stem: path.read_bytes() for path in paths if path.suffix == ".png"}
        page = self._document()
        paths.append(write_file(folder / "report.md", markdown.render(page)))
        return [*paths, write_file(folder / "report.html", html.render(page, pictures))]

    def _tables(self) -> list[Table]:
        return [_correlations_table(self.correlations), _models_table(self)]

    def _document(self) -> Document:
        title = f"{self.y.name} against {self.x.name}"
        about = [WHAT_FOLLOWS] if any(column.name.startswith("redundancy") for column in (self.x, self.y)) else []
        about.append(explained({**self.x.terms, **self.y.terms}))
        caption = "A point a model; bars: 95 % over images. Models of one family share a look."
        section = Section(title, [line for line in about if line], self._tables(), {"relate": caption})
        return Document("Scores over models", f"{len(self.models)} models", list(self.warnings), [section])


def relate(
    folders: Sequence[str | os.PathLike[str]],
    x: str = "redundancy",
    y: str = "corruptions",
    *,
    family: FamilyBy = "arch",
    locations_of: LocationFactsOf = lambda model, side: None,
) -> Relation:
    """One headline score against another over the models in results folders, with correlations within families.

    ``x`` and ``y`` are columns of the headline, or tasks, whose first one it then is. A folder without cells stands for
    all results folders inside it. ``family``: models of one architecture, of one folder, or all. Weights found in
    several folders are one model; untrained networks are left out. Raises UsageError for scores that no folder has and
    where fewer than three models have both, CossError for a folder without results.
    """
    if family not in ("arch", "folder", "none"):
        raise unknown_name("family", family, ("arch", "folder", "none"))
    runs = [Results(Store(folder)) for folder in results_folders(folders)]
    if not runs:
        raise UsageError("which models? give results folders: coss-eval relate results/a results/b results/c")
    return _related(runs, x, y, family, locations_of)


def _related(runs: Sequence[Results], x: str, y: str, family: FamilyBy, locations_of: LocationFactsOf) -> Relation:
    columns = [_column(runs, name) for name in (x, y)]
    if columns[0].name == columns[1].name:
        raise UsageError(f"--x and --y are both {columns[0].name!r}: give two scores")
    found, untrained = _gathered(runs, [column.name for column in columns], family, locations_of)
    models = [
        Related(one.name, one.family, one.x, one.y, one.clean, one.locations)
        for one in found
        if one.x is not None and one.y is not None
    ]
    if len(models) < FEWEST:
        names = f" ({', '.join(one.name for one in models)})" if models else ""
        raise UsageError(
            f"a relation needs {FEWEST} models or more with both {columns[0].name!r} and {columns[1].name!r}, got "
            f"{len(models)}{names}; give more folders"
        )
    correlations = tuple(_correlations(models))
    notes = _warnings(models, correlations, len(found) - len(models), untrained)
    notes += [
        f"Models were not measured alike, and may differ by that, too: {line}." for line in _unlike(runs, columns)
    ]
    return Relation(columns[0], columns[1], tuple(models), correlations, tuple(notes))


def _unlike(runs: Sequence[Results], columns: Sequence[Column]) -> list[str]:
    """How models were measured differently by the tasks that the scores are of."""
    names = {column.name for column in columns}
    tasks = {task for r in runs for task in r.tasks if any(c.name in names for c in task_report(task).headline(r))}
    asked = (pair for results in runs for label in results.labels for pair in results.asked(label))
    return differing(pair for pair in asked if pair[1]["task"] in tasks)


def spearman(x: Reals1D, y: Reals1D) -> Reals1D:
    """Spearman's coefficient of each row of x and y (R, n), mean ranks for ties; NaN where a row is constant."""
    return _pooled([(x, y)])


def _pooled(parts: Sequence[tuple[Reals1D, Reals1D]]) -> Reals1D:
    """The correlation (R,) of ranks taken, and centred, within each part, x and y (R, n) of its models."""
    xy, xx, yy = 0.0, 0.0, 0.0
    for x, y in parts:
        a, b = (pd.DataFrame(np.atleast_2d(values)).rank(axis=1).to_numpy() for values in (x, y))
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        xy, xx, yy = xy + (a * b).sum(1), xx + (a * a).sum(1), yy + (b * b).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Reals1D = np.asarray(xy / np.sqrt(np.asarray(xx) * yy), dtype=np.float64)
    return found


def _correlations(models: Sequence[Related]) -> Iterator[RankCorrelation]:
    """Of each family of three models or more; within them together; and of all models, whatever their family."""
    families: dict[str, list[Related]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model)
    large = {name: members for name, members in families.items() if len(members) >= FEWEST}
    for name, members in large.items():
        yield _correlation(name, [members])
    if len(large) > 1:
        yield _correlation("within families, together", [*large.values()])
    if len(families) > 1:
        yield _correlation("all models, families mixed", [models], len(families))


def _correlation(name: str, parts: Sequence[Sequence[Related]], families: int | None = None) -> RankCorrelation:
    """With the percentile bootstrap's interval over models, drawn anew within each part; constant draws are left out.

    No interval where all draws give one value, as they do for few models in perfect order.
    """
    pairs = [(np.array([m.x.value for m in part]), np.array([m.y.value for m in part])) for part in parts]
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(x), size=(RESAMPLES, len(x))) for x, _ in pairs]
    resampled = _pooled([(x[i], y[i]) for (x, y), i in zip(pairs, drawn, strict=True)])
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    if low == high:
        low = high = math.nan
    value = float(_pooled([(x[None], y[None]) for x, y in pairs])[0])
    return RankCorrelation(name, families or len(parts), sum(map(len, parts)), value, float(low), float(high))


def _warnings(
    models: Sequence[Related], correlations: Sequence[RankCorrelation], gaps: int, untrained: int
) -> list[str]:
    found = []
    most = max((c.n for c in correlations), default=len(models))
    if most < FEW:
        found.append(
            f"{len(models)} models: with fewer than {FEW} do not rely on the interval. Resamples of so few models "
            "repeat them, and ranks take few values: the coefficient says which way, at most."
        )
    if len({model.family for model in models}) > 1 and all(c.families > 1 for c in correlations):
        found.append(
            f"No family has {FEWEST} models: what stands here mixes families, and whatever differs between them moves "
            "it."
        )
    data = {estimate.data for model in models for estimate in (model.x, model.y)}
    if len(data) > 1:
        found.append(f"The scores are of {len(data)} sets of images: models differ by their images, too.")
    if gaps:
        found.append(f"{gaps} {'models lack' if gaps > 1 else 'model lacks'} one of the scores and are left out.")
    if untrained:
        one = untrained == 1
        left_out = "network is left out: it" if one else "networks are left out: they"
        found.append(f"{untrained} untrained {left_out} would be a cluster of {'its' if one else 'their'} own.")
    return found


@dataclass(frozen=True)
class _Candidate:
    """A model as the folders have it; a score may be missing."""

    name: str
    family: str
    identity: str
    x: Estimate | None
    y: Estimate | None
    clean: Estimate | None
    locations: LocationFacts | None

    def with_those_of(self, other: _Candidate) -> _Candidate:
        """The same weights from another folder: what is missing here is taken from there."""
        return replace(self, x=self.x or other.x, y=self.y or other.y, clean=self.clean or other.clean)


def _gathered(
    runs: Sequence[Results], scores: Sequence[str], family: FamilyBy, locations_of: LocationFactsOf
) -> tuple[list[_Candidate], int]:
    """Every trained model once, in the folders' order, and how many untrained ones there are."""
    found: dict[str, _Candidate] = {}
    untrained: set[str] = set()
    known: dict[str, LocationFacts | None] = {}
    for results in runs:
        columns = {column.name: column for column in headline.columns(results)}
        for label in results.labels:
            record = _record(results, label)
            model = record["protocol"].get("model", {})
            identity = _identity(results, label)
            if results.untrained.issuperset(results.members(label)):
                untrained.add(identity)
                continue
            arch, place = _architecture(model), f"{_architecture(model)} at {_side(record)}"
            if place not in known:
                known[place] = locations_of(model, _side(record))
            of = [columns[name].of(label) if name in columns else None for name in (*scores, *CLEAN)]
            families = {"arch": arch, "folder": results.store.path.name, "none": "all"}
            one = _Candidate(label, families[family], identity, of[0], of[1], of[2] or of[3], known[place])
            found[identity] = found[identity].with_those_of(one) if identity in found else one
    return _named_apart(list(found.values())), len(untrained)


def _named_apart(found: Sequence[_Candidate]) -> list[_Candidate]:
    """Models of one name get their weights' hash."""
    names = [one.name for one in found]
    return [
        replace(one, name=f"{one.name} ({one.identity[:8]})") if names.count(one.name) > 1 else one for one in found
    ]


def _record(results: Results, label: str) -> Record:
    """A stored cell of a checkpoint."""
    cells = (cell for task in results.tasks for cell in results.cells(task, label))
    return next(cells)


def _identity(results: Results, label: str) -> str:
    """The hashes of a checkpoint's weights, or of all runs of a method: one run alone is another model."""
    cells = (cell for task in results.tasks for cell in results.cells(task, label))
    hashes = {str(cell["protocol"].get("model", {}).get("sha256", "")) for cell in cells} - {""}
    return " ".join(sorted(hashes)) or f"{results.store.path} {label}"


def _architecture(model: Mapping[str, Any]) -> str:
    """ "resnet18, stem cifar, width 32": the name with the options that its protocol has."""
    options = [f"{name} {model[name]}" for name in ("stem", "width", "pooling") if name in model]
    return ", ".join([str(model.get("arch", "?")), *options])


def _side(record: Record) -> int:
    """The side in pixels of the images that the network itself gets; 0 where the cell does not tell."""
    protocol = record["protocol"]
    inside = (protocol.get("model", {}).get("preprocessing") or {}).get("img_size")
    size = (protocol.get("geometry") or {}).get("size") or 0
    return int(inside or (max(size) if isinstance(size, list) else size))


def _column(runs: Sequence[Results], name: str) -> Column:
    """The headline's column of that name, or the first one of the task of that name that is not its clean accuracy."""
    known: dict[str, Column] = {}
    for results in runs:
        known = {column.name: column for column in headline.columns(results)} | known
    if name in known:
        return known[name]
    of_task = (
        column.name for results in runs if name in results.tasks for column in task_report(name).headline(results)
    )
    first = next((each for each in of_task if each in known and each != CLEAN[0]), None)
    if first is None:
        tasks = {task for results in runs for task in results.tasks}
        if name in tasks:
            scores = ", ".join(map(repr, known))
            raise UsageError(f"{name} has no score in the headline of these folders; give one that they have: {scores}")
        raise unknown_name("score", name, list(dict.fromkeys([*known, *sorted(tasks)])))
    return known[first]


def _correlations_table(correlations: Sequence[RankCorrelation]) -> Table:
    rows = [
        Row(c.name, [Number(c.value, c.low, c.high, "plain") if math.isfinite(c.value) else None, str(c.n)])
        for c in correlations
    ]
    caption = (
        f"Brackets: 95 %, percentile bootstrap over models within their family. A family of fewer than {FEWEST} models "
        "has none of its own. No interval where all resamples agree: by chance alone, three unrelated models are in "
        "perfect order in 1 of 3 cases, four in 1 of 12, five in 1 of 60. No score is partialled out: clean accuracy, "
        "receptive field and number of locations stand beside."
    )
    return Table("correlations", "Rank correlations", "Spearman", ["coefficient", "models"], rows, caption)


def _models_table(relation: Relation) -> Table:
    rows = []
    families = list(dict.fromkeys(m.family for m in relation.models))
    for m in sorted(relation.models, key=lambda m: families.index(m.family)):  # stable: each family under one heading
        numbers = [_number(m.x, relation.x.unit), _number(m.y, relation.y.unit), _number(m.clean, "percent")]
        beside = ["", ""] if m.locations is None else [_field_text(m.locations), str(m.locations.number)]
        rows.append(Row(m.name, [*numbers, *beside], m.family))
    columns = [f"{c.name}{' %' if c.unit == 'percent' else ''}" for c in (relation.x, relation.y)]
    counts = sorted({min(m.x.n, m.y.n) for m in relation.models})
    n = f"n = {counts[0]}" + (f" to {counts[-1]} images" if len(counts) > 1 else " images")
    columns += ["clean accuracy %", "receptive field, px", "locations"]
    caption = "The theoretical receptive field before pooling; empty where the architecture is not known by its name."
    return Table("models", "Models", n, columns, rows, caption)


def _field_text(locations: LocationFacts) -> str:
    return "whole image" if math.isinf(locations.receptive_field) else f"{locations.receptive_field:g}"


def _number(estimate: Estimate | None, unit: Unit) -> Number | None:
    return None if estimate is None else Number(estimate.value, estimate.low, estimate.high, unit)


def scatter_of(results: Results, x: str, y: str, canvas: Canvas = WHOLE) -> Figure:
    """The figure of one folder's models, of those on ``canvas`` alone, each in its own look."""
    found = _related([results], x, y, "none", lambda model, side: None)
    names = {label: label for label in canvas.shown(results.labels)}
    models = tuple(model for model in found.models if model.name in names)
    return _scatter(replace(found, models=models), canvas.width, looks_of(results, results.labels, canvas))


def _scatter(relation: Relation, width: float | None = None, own: Mapping[str, Look] | None = None) -> Figure:
    """A point a model in its family's look; in its ``own`` by its name where these are given."""
    figure = Figure(figsize=(width or 5.4, min(width or 5.4, 3.8)), layout="constrained")
    axis = figure.subplots()
    families = list(dict.fromkeys(model.family for model in relation.models))
    look = looks(families)
    scale = [100 if column.unit == "percent" else 1 for column in (relation.x, relation.y)]
    places = []
    for model in relation.models:
        (x, *across), (y, *along) = (
            [math.nan if bound is None else by * bound for bound in (e.value, e.low, e.high)]
            for e, by in zip((model.x, model.y), scale, strict=True)
        )
        one = look[model.family] if own is None else own[model.name]
        axis.plot(across, [y, y], color=one.color, linewidth=0.8, alpha=0.5)
        axis.plot([x, x], along, color=one.color, linewidth=0.8, alpha=0.5)
        axis.plot(x, y, marker=one.marker or ".", color=one.color, linestyle="")
        places.append((x, y, "\n".join(broken(model.name, 24))))
    names = [f"{c.name}{', %' if c.unit == 'percent' else ''}" for c in (relation.x, relation.y)]
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if len(families) > 1 and own is None:
        legend(figure, look)
    if len(places) <= NAMED:
        name_points(axis, places)
    return figure
