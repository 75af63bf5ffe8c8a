"""Models or methods of any folders side by side: differences with intervals, p-values and what forbids them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from coss_eval.errors import CossError, UsageError
from coss_eval.reports import headline
from coss_eval.reports.by_task import task_report
from coss_eval.reports.estimates import Estimate, difference
from coss_eval.reports.files import write_file
from coss_eval.reports.folders import chosen, read
from coss_eval.reports.groups import differing, matching, methods_of
from coss_eval.reports.latex import latex
from coss_eval.reports.layout import Number, Row, Table, markdown
from coss_eval.reports.layout import text as table_text
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Score
from coss_eval.statistics import SEEDS_FOR_P, holm
from coss_eval.store import Store

COLUMNS = [
    "task",
    "table",
    "group",
    "score",
    "a",
    "b",
    "value_a",
    "value_b",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "n",
    "unit",
    "n_a",
    "n_b",
    "seeds_a",
    "seeds_b",
    "lower_is_better",
]
NOTE = (
    "Differences are the second minus the first; p is adjusted over each table (Holm). One seed a side is paired over "
    f"images and compares two checkpoints, not two methods; with several, seeds and images are new, and fewer than "
    f"{SEEDS_FOR_P} seeds have no p; a method beside a single checkpoint has no interval."
)


@dataclass(frozen=True)
class _Side:
    """One of the two that are compared: its folder's results and its label there."""

    results: Results
    label: str


def compare(
    run_a: str | os.PathLike[str],
    run_b: str | os.PathLike[str],
    *,
    force: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    models: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """b minus a over the images that both saw: one row a score that both have.

    A side is a results folder, or "folder::model" for a model or method of it, or a glob of several; the folders may be
    one. A name that has several rows, such as one a limit, is paired wherever images and protocols are alike. Without
    names, models of the same name are paired, and a run with one model with every one of the other. ``groups`` names
    methods by patterns of their runs' names, where these do not say so themselves. Columns: task, table,
    group, score, a, b (labels), value_a, value_b, difference, low, high, p, p_holm (over the table), n, unit, the
    images and seeds of each side, and whether a lower score is the better one. Accuracies are fractions.
    ``attrs["warnings"]`` says what makes the two hard to compare. ``models`` are names or globs of those to show, in
    that order, which changes no p; ``rename`` gives models other names. Raises CossError for a folder without cells,
    UsageError for unknown names, where nothing can be paired, and, unless ``force`` is given, where images or protocols
    differ.
    """
    (folder_a, name_a), (folder_b, name_b) = (_named(path) for path in (run_a, run_b))
    a, b = (_results(store, groups) for store in read(folder_a, folder_b, rename=rename))
    if groups:
        methods_of([name for results in (a, b) for label in results.family for name in results.models(label)], groups)
    sides, alone = _alike([(_Side(a, one), _Side(b, other)) for one, other in _pairs(a, b, name_a, name_b)])
    different = list(dict.fromkeys(line for pair in sides for line in _differing(*pair)))
    if different and not force:
        raise UsageError(f"{different[0]}; add --force (force=True) to compare them nevertheless")
    rows = [row for pair in sides for task in _tasks(a, b) for row in _task_rows(*pair, task)]
    if not rows:
        raise UsageError(f"no score in common: {a.store.path} has {', '.join(a.tasks)}, the other {', '.join(b.tasks)}")
    frame = pd.DataFrame(rows, columns=COLUMNS)
    for _, of_table in frame.groupby("table", sort=False).groups.items():
        frame.loc[of_table, "p_holm"] = holm(frame.loc[of_table, "p"].astype(float))
    frame["p_holm"] = frame["p_holm"].astype(float)
    warnings = list(dict.fromkeys([*a.warnings, *b.warnings, *different, *alone, *_devices(a, b)]))
    frame.attrs |= {"warnings": warnings, "runs": [results.store.path.name for results in (a, b)]}
    return _shown(frame, models, {label: r.names(label) for r in (b, a) for label in r.labels}) if models else frame


def _shown(frame: pd.DataFrame, models: Sequence[str], called: Mapping[str, set[str]]) -> pd.DataFrame:
    """The rows that compare two of ``models``, in the order of these; a model of each side stays beside them."""
    wanted = chosen(models, called)
    keep = [label for label in wanted if label in {*frame["a"], *frame["b"]}]
    one_a, one_b = (frame[side].nunique() == 1 for side in "ab")
    rows = frame[(frame["a"].isin(keep) | one_a) & (frame["b"].isin(keep) | one_b)]
    if rows.empty:
        raise UsageError(
            f"--models {' '.join(models)}: no pair of these is compared; leave --models out to see the pairs"
        )
    place = {label: i for i, label in enumerate(keep)}
    order = sorted(rows.index, key=lambda i: tuple(place.get(str(rows.loc[i, side]), -1) for side in "ab"))  # stable
    return rows.loc[order]


def text(frame: pd.DataFrame, width: int | None = None, *, coloured: bool = False) -> str:
    """The comparison for a terminal: warnings first, then a table a table; what each difference shows beside it."""
    lines = [f"WARNING  {warning}" for warning in frame.attrs.get("warnings", [])]
    shown = [_fitting(table, width, coloured) + "\n" for table in tables(frame)]
    return "\n".join([*lines, *shown, NOTE])


def _fitting(table: Table, width: int | None, coloured: bool) -> str:
    """A table without its last column, the difference in words, where that would stand in a block of its own."""
    whole = table_text(table, width, coloured=coloured)
    if "\n\n" not in whole:
        return whole
    numbers = replace(table, columns=table.columns[:-1], rows=[replace(r, entries=r.entries[:-1]) for r in table.rows])
    return table_text(numbers, width, coloured=coloured)


def tables(frame: pd.DataFrame) -> list[Table]:
    """A table for each pair and table of scores, headed by the two, with their images where these differ."""
    found = []
    for (label_a, label_b, name), rows in frame.groupby(["a", "b", "table"], sort=False):
        entries = []
        for row in rows.to_dict("records"):
            shown = _difference(row)
            values = [Number(row[value], unit=row["unit"]) for value in ("value_a", "value_b")]
            entries.append(Row(row["score"], [*values, shown, shown.reading], row["group"]))
        columns = [str(label_a), str(label_b)]
        if label_a == label_b:
            columns = [f"{label_a}, {run}" for run in frame.attrs["runs"]]
        change = f"{columns[1]} minus {columns[0]}"
        n = _images(rows["n"])
        columns = [f"{c}{_sizes(rows, side, n)}" for c, side in zip(columns, "ab", strict=True)]
        found.append(Table(str(name), str(name), f"{name}, {n}", [*columns, change, "seen"], entries))
    return found


def write(frame: pd.DataFrame, out: Path) -> list[Path]:
    """comparison.md, comparison.csv (fractions), tables/*.tex and figures/comparison.png, .pdf in ``out``."""
    from coss_eval.reports.drawing import save, style

    parts = ["# Comparison", *(f"> **{warning}**" for warning in frame.attrs["warnings"])]
    paths = [write_file(out / "comparison.csv", frame.to_csv(index=False, lineterminator="\n"))]
    with style():
        paths += save(figure(frame), out / "figures" / "comparison")
    parts.append("![Differences with 95 % intervals](figures/comparison.png)")
    for number, table in enumerate(tables(frame)):
        paths.append(write_file(out / "tables" / f"{number}_{table.name}.tex", latex(table)))
        parts += [f"## {table.title}", markdown(table)]
    return [write_file(out / "comparison.md", "\n\n".join([*parts, NOTE]) + "\n"), *paths]


def figure(frame: pd.DataFrame) -> Any:
    """A forest plot of the first table's differences that are of shares of images: a row a score, a mark a pair."""
    from coss_eval.reports.drawing import WIDTH, Figure, legend, looks

    shares = frame[(frame["unit"] == "percent") & frame["low"].notna()]
    shown = shares if shares.empty else shares[shares["table"] == shares["table"].iloc[0]]
    scores = list(dict.fromkeys(zip(shown["group"], shown["score"], strict=True)))
    look = looks(list(dict.fromkeys(f"{b} minus {a}" for a, b in zip(shown["a"], shown["b"], strict=True))))
    drawn = Figure(figsize=(0.7 * WIDTH, 1.0 + 0.3 * max(1, len(scores))), layout="constrained")
    axis = drawn.subplots()
    for row in shown.to_dict("records"):
        pair = f"{row['b']} minus {row['a']}"
        y = scores.index((row["group"], row["score"])) + 0.7 * ((list(look).index(pair) + 0.5) / len(look) - 0.5)
        axis.hlines(y, 100 * row["low"], 100 * row["high"], color=look[pair].color)
        axis.plot(100 * row["difference"], y, look[pair].marker, color=look[pair].color)
    axis.axvline(0, color="#555555", linewidth=0.7)
    axis.set_yticks(range(len(scores)), [" ".join(part for part in score if part) for score in scores])
    axis.set_ylim(len(scores) - 0.5, -0.5)
    axis.set_xlabel("difference, points (bars: 95 %)")
    if look:
        legend(drawn, look)
    return drawn


def _difference(row: dict[Any, Any]) -> Number:
    better = {"p": row["p_holm"], "lower_is_better": bool(row["lower_is_better"])}
    return Number(row["difference"], row["low"], row["high"], row["unit"], signed=True, **better)


def _sizes(rows: pd.DataFrame, side: str, usual: str) -> str:
    """ " (n = 500)": the images of a side where they are not the ``usual`` ones."""
    images = _images(rows[f"n_{side}"])
    return "" if images == usual else f" ({images})"


def _images(counts: pd.Series[int]) -> str:
    """ "n = 500", or "n = 100 to 500"."""
    return "n = " + " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))


def _named(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The folder and the model that "folder::model" names."""
    folder, sign, name = os.fspath(path).partition("::")
    if sign and not name:
        raise UsageError(f"{folder}:: names no model; write {folder}::NAME, or {folder} for all of it")
    return folder, name or None


def _results(store: Store, groups: Mapping[str, Sequence[str]] | None) -> Results:
    names = {str(record["model"]) for record in store.records()}
    results = Results(store, matching(groups or {}, [*names]))  # which may all be in the other folder
    if not results.records:
        raise CossError(f"no finished cells in {store.path}; give a results folder that coss-eval has written")
    return results


def _tasks(a: Results, b: Results) -> list[str]:
    return ["headline", *(task for task in a.tasks if task in b.tasks)]


def _pairs(a: Results, b: Results, name_a: str | None, name_b: str | None) -> Iterator[tuple[str, str]]:
    left = a.labels if name_a is None else _rows(a, name_a)
    right = b.labels if name_b is None else _rows(b, name_b)
    shared = [label for label in left if label in right]
    if len(left) == 1 or len(right) == 1 or (name_a is not None and name_b is not None):
        yield from ((one, other) for one in left for other in right)
    elif shared:
        yield from ((label, label) for label in shared)
    else:
        raise UsageError(
            f"no checkpoint to pair: the first run has {', '.join(left)}, the second {', '.join(right)}; "
            "give runs that share names or have one checkpoint each, or name them: FOLDER::MODEL"
        )


def _rows(results: Results, name: str) -> list[str]:
    """The rows of a model or method, or of all that a glob matches."""
    if any(character in name for character in "*?[") and name not in results.labels:
        return chosen([name], {label: results.names(label) for label in results.labels})
    return results.rows_of(name, "model")


def _alike(pairs: Sequence[tuple[_Side, _Side]]) -> tuple[list[tuple[_Side, _Side]], list[str]]:
    """Those of several pairs whose images and protocols are alike, with lines that name what is in none of them.

    All of the pairs where there is a single one, or none is alike.
    """
    found = [pair for pair in pairs if not _differing(*pair)]
    if len(pairs) < 2 or not found:
        return [*pairs], []
    paired = {(id(side.results), side.label) for pair in found for side in pair}
    rest = dict.fromkeys(s.label for pair in pairs for s in pair if (id(s.results), s.label) not in paired)
    return found, [f"not compared, as the other side has no such images or protocol: {label}" for label in rest]


def _task_rows(a: _Side, b: _Side, task: str) -> list[dict[str, Any]]:
    left, right = ({(t, s.group, s.name): s for t, s in _scores(side.results, task)} for side in (a, b))
    rows: list[dict[str, Any]] = []
    for key, score in left.items():
        one = score.of(a.label)
        other = right[key].of(b.label) if key in right else None
        found = difference(other, one)
        if one is None or other is None or found is None:
            continue
        table, group, name = key
        rows.append(
            {"task": task, "table": table, "group": group, "score": name, "a": a.label, "b": b.label}
            | {"value_a": one.value, "value_b": other.value}
            | dict(zip(("difference", "low", "high", "p", "n"), found, strict=True))
            | {"unit": score.unit, "n_a": one.n, "n_b": other.n, "seeds_a": _seeds(one), "seeds_b": _seeds(other)}
            | {"lower_is_better": score.lower_is_better}
        )
    return rows


def _seeds(estimate: Estimate) -> int:
    return max(1, len(estimate.runs))


def _scores(results: Results, task: str) -> list[tuple[str, Score]]:
    """Every score of a task with the name of its table, but references; groups of further tables say whose they are."""
    found: list[tuple[str, Score]]
    if task == "headline":
        found = [("headline", column) for column in headline.columns(results)]
    else:
        main, *others = task_report(task).scores(results)
        found = [(main.name, score) for score in main.scores]
        found += [(t.name, replace(s, group=s.group or t.title)) for t in others for s in t.scores]
    return [(name, score) for name, score in found if not score.reference]


def _differing(a: _Side, b: _Side) -> list[str]:
    """Why a difference may not be the models' own: other images, limits or protocols."""
    found = []
    one, other = _facts(a), _facts(b)
    for name in one:
        if one[name] != other[name]:
            found.append(f"{name} differ: {', '.join(one[name])} and {', '.join(other[name])}")
    return found + differing(pair for side in (a, b) for pair in side.results.asked(side.label))


def _facts(side: _Side) -> dict[str, list[str]]:
    """The images that a side's numbers rest on, of the tasks that it has."""
    cells = [cell for task in side.results.tasks for cell in side.results.cells(task, side.label)]
    data = [cell["protocol"].get("data", {}) for cell in cells]
    values = {
        "datasets": [one.get("name") for one in data],
        "images (fingerprints)": [one.get("fingerprint") for one in data],
        "limits": [one.get("limit") for one in data],
    }
    return {name: sorted(set(map(str, some))) for name, some in values.items()}


def _devices(a: Results, b: Results) -> list[str]:
    """Perturbations are equal within a device type only."""
    one, other = (sorted({str(run["device"]).split(":")[0] for run in r.runs if run.get("device")}) for r in (a, b))
    return [] if one == other else [f"device types differ: {', '.join(one)} and {', '.join(other)}"]
