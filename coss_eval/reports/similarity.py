"""The similarity of networks and layers as a tidy table, heat maps and a page. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from coss_eval.errors import unknown_name
from coss_eval.reports import html, layout, markdown, provenance
from coss_eval.reports.document import Document, Section
from coss_eval.reports.drawing import WIDTH, Figure, save, style
from coss_eval.reports.files import write_file
from coss_eval.reports.layout import Number, Row, Table

TITLES = {
    "cka": "Linear CKA, debiased",
    "rsa": "RSA: Spearman's correlation of dissimilarities",
    "procrustes": "Procrustes similarity",
}
CAPTIONS = {
    "cka": "1: equal up to rotation and scale; about 0: unrelated. HSIC_1 averaged over minibatches (Nguyen et al. "
    "2021); brackets: 95 %, leaving out one minibatch after the other.",
    "rsa": "Of 1 - Pearson's r between all pairs of images (Kriegeskorte et al. 2008); brackets: 95 %, leaving out one "
    "twentieth of the images after the other, so that no image is paired with itself.",
    "procrustes": "1: equal up to rotation and scale. It grows with the number of units relative to that of images: "
    "compare at equal n; brackets as for RSA.",
}
FEW = 16  # representations whose values fit into the squares of a heat map


class Place(NamedTuple):
    """Where a representation is from."""

    model: str
    site: str


@dataclass(frozen=True)
class SimilarityValues:
    """One measure of all pairs of R representations with its interval, (R, R) each, NaN where there is none."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int  # images
    ceilings: NDArray[np.float64]  # (R,), what a representation's own noise leaves to reach: 1 for a network

    def ceiling(self, i: int, j: int) -> float:
        """What a pair without any difference but noise would have; NaN where that is not known."""
        return float(self.ceilings[i] * self.ceilings[j])


@dataclass(frozen=True)
class Similarities:
    """How alike the representations at ``places`` are, by measure; ``entry`` is what run.json keeps of the run."""

    places: tuple[Place, ...]
    measures: Mapping[str, SimilarityValues]
    entry: Mapping[str, Any]

    def table(self) -> pd.DataFrame:
        """One row a measure and pair: measure, model_a, site_a, model_b, site_b, value, low, high, n, ceiling.

        The ceiling is 1 between networks, below it with recordings that have repeats, and NaN with others.
        """
        rows = [
            (
                *(name, *self.places[i], *self.places[j], found.value[i, j], found.low[i, j], found.high[i, j]),
                *(found.n, found.ceiling(i, j)),
            )
            for name, found in self.measures.items()
            for i in range(len(self.places))
            for j in range(i + 1, len(self.places))
        ]
        columns = ["measure", "model_a", "site_a", "model_b", "site_b", "value", "low", "high", "n", "ceiling"]
        return pd.DataFrame(rows, columns=columns)

    def matrix(self, measure: str = "cka") -> pd.DataFrame:
        """One measure of all pairs, rows and columns by (model, site). Raises UsageError for one not measured."""
        names = pd.MultiIndex.from_tuples(self.places, names=["model", "site"])
        return pd.DataFrame(self._measure(measure).value, names, names)

    def plot(self, measure: str = "cka") -> Figure:
        """The heat map of one measure."""
        found = self._measure(measure)
        with style():
            return heat_map(self.places, found, TITLES[measure])

    def write(self, out: Path) -> list[Path]:
        """similarity.csv, tables/, figures/, report.md and report.html in the folder ``out``; the paths written."""
        paths = [write_file(out / "similarity.csv", self.table().to_csv(index=False, lineterminator="\n"))]
        for name in self.measures:
            with style():
                paths += save(self.plot(name), out / "figures" / f"similarity_{name}")
        pictures = {path.stem: path.read_bytes() for path in paths if path.suffix == ".png"}
        page = self._document()
        for table in page.tables:
            paths.append(write_file(out / "tables" / f"{table.name}.csv", layout.to_csv(table)))
        paths.append(write_file(out / "report.md", markdown.render(page)))
        return [*paths, write_file(out / "report.html", html.render(page, pictures))]

    def _measure(self, name: str) -> SimilarityValues:
        if name not in self.measures:
            raise unknown_name("measure", name, self.measures)
        return self.measures[name]

    def _document(self) -> Document:
        recorded = [one["name"] for one in self.entry.get("recordings", [])]
        sections = [
            Section(
                TITLES[name],
                [self.entry["protocol"]],
                [
                    _table(self.places, name, found),
                    *([_shares(self.places, name, found, recorded)] if recorded else []),
                ],
                {f"similarity_{name}": f"{TITLES[name]} on {found.n:,} images."},
            )
            for name, found in self.measures.items()
        ]
        data = self.entry["data"]
        limit = data["test"]["limit"]
        flags = (
            [] if limit is None else [f"LIMITED: these numbers are from a subset of the test split (limit {limit})."]
        )
        about = [_models(self.entry["models"]), _data(data), *provenance.runs_table([dict(self.entry)])]
        networks = len({place.model for place in self.places} - set(recorded))
        of = f"{networks} network{'s' * (networks > 1)}" + (f" and {len(recorded)} recordings" if recorded else "")
        subtitle = f"{len(self.places)} representations of {of} on {data['name']}"
        warnings = [*flags, *self.entry["warnings"]]
        return Document(
            "Similarity of representations", subtitle, warnings, [*sections, Section("Provenance", [], about)]
        )


def heat_map(places: Sequence[Place], found: SimilarityValues, title: str) -> Figure:
    """A square a pair, from 0 to 1; lines part the networks, whose names stand beside their sites."""
    count = len(places)
    side = min(9.0, max(3.2, 0.36 * count))
    figure = Figure(figsize=(max(side + 2.6, WIDTH / 2), side + 1.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(found.value, vmin=0, vmax=1, cmap="viridis")
    axis.grid(False)
    several = len({place.model for place in places}) > 1
    names = [f"{place.model}  {place.site}" if several else place.site for place in places]
    size = 7 if count <= 30 else max(2.5, 210 / count)
    axis.set_xticks(range(count), names, rotation=90, fontsize=size)
    axis.set_yticks(range(count), names, fontsize=size)
    for place in range(1, count):
        if places[place].model != places[place - 1].model:
            axis.axhline(place - 0.5, color="white", linewidth=1.2)
            axis.axvline(place - 0.5, color="white", linewidth=1.2)
    if count <= FEW:
        for i, j in np.ndindex(count, count):
            color = "black" if found.value[i, j] > 0.6 else "white"
            axis.text(j, i, _short(float(found.value[i, j])), ha="center", va="center", color=color, fontsize=6)
    axis.set_title(f"{title}, n = {found.n:,}")
    figure.colorbar(image, shrink=0.8)
    return figure


def _short(value: float) -> str:
    """ ".83", "1", "−.02"."""
    text = f"{value:.2f}"
    return "1" if text == "1.00" else text.replace("0.", ".", 1).replace("-", "−")


def _table(places: Sequence[Place], name: str, found: SimilarityValues) -> Table:
    """Every pair, with its interval: above the diagonal only, whose entries are 1."""
    names = [" ".join(place) for place in places]
    rows = [
        Row(names[i], [_number(found, i, j) if j > i else "" for j in range(1, len(names))])
        for i in range(len(names) - 1)
    ]
    return Table(f"similarity_{name}", TITLES[name], f"n = {found.n:,}", names[1:], rows, CAPTIONS[name])


def _shares(places: Sequence[Place], name: str, found: SimilarityValues, recorded: Sequence[str]) -> Table:
    """Each network's sites against each recording, with the share of its ceiling that they reach."""
    rows = []
    for j in (place for place, one in enumerate(places) if one.model in recorded):
        for i in (place for place, one in enumerate(places) if one.model not in recorded):
            ceiling = found.ceiling(i, j)
            of_it = [None, None] if np.isnan(ceiling) else [f"{ceiling:.3f}", f"{found.value[i, j] / ceiling:.3f}"]
            rows.append(Row(" ".join(places[i]), [_number(found, i, j), *of_it], places[j].model))
    caption = (
        "Ceiling: what a model without noise and fault would have with the mean of all repeats, by their split halves "
        "and Spearman and Brown; missing without repeats, and for Procrustes."
    )
    columns = [name, "noise ceiling", "share of it"]
    return Table(f"recordings_{name}", "Against recordings", f"n = {found.n:,}", columns, rows, caption)


def _number(found: SimilarityValues, i: int, j: int) -> Number:
    return Number(float(found.value[i, j]), float(found.low[i, j]), float(found.high[i, j]), "plain")


def _models(models: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["architecture", "weights (sha256)", "layout", "normalisation"]
    rows = [Row(m["name"], [m["arch"], m["sha256"][:16], m["layout"], m["normalisation_source"]]) for m in models]
    return Table("models", "Checkpoints", "model", columns, rows)


def _data(data: Mapping[str, Any]) -> Table:
    test = data["test"]
    limit = "none" if test["limit"] is None else str(test["limit"])
    return Table("data", "Data", "dataset", ["n", "limit", "fingerprint"], [
        Row(data["name"], [f"{test['n']:,}", limit, test["fingerprint"]])
    ])  # fmt: skip
