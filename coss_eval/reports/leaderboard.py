"""Several results folders as a leaderboard: a table a protocol, with intervals, ranks and ties. Imports no torch.

A number stands only beside numbers of the same images and settings: other images have a table of their own, and a score
whose settings differ has a column for each. Nothing is averaged over what was not measured; a gap is shown.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coss_eval.reports import headline, html, markdown
from coss_eval.reports.by_task import task_report
from coss_eval.reports.document import Document, Section
from coss_eval.reports.estimates import Estimate, difference
from coss_eval.reports.files import write_file
from coss_eval.reports.folders import Folders, chosen, results_folders
from coss_eval.reports.groups import matching, methods_of
from coss_eval.reports.latex import latex
from coss_eval.reports.layout import Entry, Number, Row, Table, to_csv
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, explained
from coss_eval.statistics import all_pairs, holm
from coss_eval.store import Condition, Record, canonical_json

ALPHA = 0.05
LONGEST = 24  # characters of a setting in the head of a column
TIED = "Tied: nothing tells the model from others of overlapping ranks. A gap was not measured. See How to read it."
RANKS = (
    "A rank of 2 to 5 means that one model is clearly better and that all ranked below 5 are clearly worse; models "
    "whose ranks overlap may be tied, and a single number is a rank that nothing disputes. Clearly: p < .05 of the "
    "paired test over the same images, adjusted over all pairs of models and all ranked scores of the table (Holm); "
    "where there is no p (two or three seeds, or verdicts on the images that are not stored), a 95 % interval of the "
    "difference without 0, unadjusted. A method of several seeds is one row, about new seeds and new images; beside a "
    "single checkpoint there is no test, and the two count as tied. Rank 1 is the best. Scores that are no share of "
    "images, such as redundancy, have no better or worse and no rank. Ranks are those among all models of the table, "
    "whatever is shown of it."
)
GAPS = "A gap is a number that was not measured, or a mean of which a part was not: no mean is taken over the rest."
# narrows the page to one protocol; without scripts, its links lead there
SCRIPT = """<script>
(() => {
  const parts = [...document.querySelectorAll("section[id^='protocol-']")];
  if (parts.length < 2) return;
  const label = document.createElement("label"), list = document.createElement("select");
  label.append("Protocol: ", list);
  list.append(new Option("all", ""));
  for (const part of parts) list.append(new Option(part.querySelector("h2").textContent, part.id));
  list.addEventListener("change", () => {
    for (const part of parts) part.hidden = list.value !== "" && part.id !== list.value;
  });
  document.querySelector("nav").prepend(label, " ");
})();
</script>
</body>"""


@dataclass(frozen=True)
class Board:
    """The models measured on the same images, from the best of the first score on."""

    title: str
    images: str
    columns: list[Column]
    called: dict[str, set[str]]  # the labels in order, with all names that each goes by
    beside: dict[str, tuple[str, str]]  # the pixels and the head that each was measured with
    warnings: list[str]

    def ranks(self, shown: Sequence[str]) -> dict[str, list[Entry]]:
        """The ranks of these labels among all, "1" or "2 to 5 tied", by score; None for a gap."""
        labels = [*self.called]
        ranked = [column for column in self.columns if column.unit == "percent" and not column.reference]
        found: dict[str, list[Entry]] = {}
        for column, better in zip(ranked, clearly_better(ranked, labels), strict=True):
            measured = sum(column.of(label) is not None for label in labels)
            first, last = 1 + better.sum(axis=0), measured - better.sum(axis=1)
            texts = [f"{a} to {b} tied" if a < b else f"{a}" for a, b in zip(first, last, strict=True)]
            known = {label: text for label, text in zip(labels, texts, strict=True) if column.of(label) is not None}
            found[column.name] = [known.get(label) for label in shown]
        return found


def write(
    folders: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    models: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> list[Path]:
    """leaderboard.html, which needs no other file, leaderboard.md, and tables/*.csv in ``out``; the paths written.

    A folder without cells stands for all results folders inside it. ``groups`` names methods by patterns of their runs'
    names, ``models`` those to show, in that order (ranks stay those among all), ``rename`` gives models other names.
    Raises CossError for a folder without results, UsageError for unknown names.
    """
    found = results_folders(folders)
    page = document(boards(Folders.of(found).renamed(rename or {}), groups), len(found), models)
    shown = html.render(page, {}, {table.name: latex(table) for table in page.tables}).replace("</body>", SCRIPT)
    paths = [write_file(out / "leaderboard.html", shown), write_file(out / "leaderboard.md", markdown.render(page))]
    return paths + [write_file(out / "tables" / f"{table.name}.csv", to_csv(table)) for table in page.tables]


def document(everything: Sequence[Board], folders: int, models: Sequence[str] = ()) -> Document:
    """The page: a section a board, and how to read it."""
    called = {label: names for board in everything for label, names in board.called.items()}
    wanted = chosen(models, called)
    shown = [
        [label for label in wanted if label in board.called] if models else [*board.called] for board in everything
    ]
    kinds = f"{len(everything)} protocol{'' if len(everything) == 1 else 's'}"
    subtitle = f"{len(called)} models and methods from {folders} folders, {kinds}"
    pairs = zip(everything, shown, strict=True)
    sections = [_section(number, board, labels) for number, (board, labels) in enumerate(pairs, 1) if labels]
    told = dict.fromkeys(warning for board in everything for warning in board.warnings)
    return Document("coss-eval leaderboard", subtitle, [*told], [*sections, Section("How to read it", [RANKS, GAPS])])


def boards(gathered: Folders, groups: Mapping[str, Sequence[str]] | None = None) -> list[Board]:
    """A board for all cells of the same images, those with the most models first."""
    by_images: dict[str, list[Record]] = {}
    for record in gathered.records():
        by_images.setdefault(canonical_json(_images(record)), []).append(record)
    if groups:
        methods_of([str(record["model"]) for record in gathered.records()], groups)  # raises for what matches nothing
    titles = _titles([_images(records[0]) for records in by_images.values()])
    found = [
        _board(title, gathered, records, groups or {})
        for title, records in zip(titles, by_images.values(), strict=True)
    ]
    return sorted(found, key=lambda board: -len(board.called))  # stable


def _images(record: Record) -> dict[str, str | int | None]:
    """What tells the images of a cell from others."""
    data = record["protocol"].get("data", {})
    return {name: data.get(name) for name in ("name", "split", "limit", "fingerprint")}


def _titles(images: Sequence[Mapping[str, str | int | None]]) -> list[str]:
    """A title for each set of images: the dataset's name, and what tells it from others of that name."""
    titles = []
    for one in images:
        parts = [str(one["name"])]
        parts += [f"{one['split']} split"] if one["split"] not in ("test", None) else []
        parts += [f"limit {one['limit']}"] if one["limit"] is not None else []
        titles.append(", ".join(parts))
    return [
        f"{title}, images {str(one['fingerprint'])[:8]}" if titles.count(title) > 1 else title
        for title, one in zip(titles, images, strict=True)
    ]


def _board(title: str, gathered: Folders, records: Sequence[Record], groups: Mapping[str, Sequence[str]]) -> Board:
    kinds = {task: _kinds([r for r in records if r["task"] == task]) for task in {r["task"] for r in records}}
    usual = {task: found[0] for task, found in kinds.items()}
    base = _results(gathered, records, usual, groups)
    labels, columns_of = dict.fromkeys(base.labels), headline.columns(base)
    order, found = [column.name for column in columns_of], dict[str, list[tuple[str, Column]]]()
    for task in base.tasks:
        for kind in kinds[task]:
            results, columns = base, columns_of
            if kind is not usual[task]:
                results = _results(gathered, records, usual | {task: kind}, groups)
                columns = headline.columns(results)
                labels |= dict.fromkeys(results.labels)
            own = {column.name for column in task_report(task).headline(results)}
            mine = [_known_to(results, column) for column in columns if column.name in own]
            for column in mine:
                found.setdefault(column.name, []).append((_setting(kind), column))
    columns = [one for name in dict.fromkeys([*order, *found]) for one in _told_apart(found[name], [*labels])]
    by_place = sorted(labels, key=lambda label: _place(columns[0], label)) if columns else [*labels]
    called = {label: base.names(label) for label in by_place}
    beside = {label: (_pixels(base, label), _head(base, label)) for label in by_place}
    return Board(title, _described(records[0]), columns, called, beside, [*base.warnings, *base.groups.warnings])


def _kinds(records: Sequence[Record]) -> list[dict[str, str]]:
    """The settings of a task that differ between cells which measured the same thing, the most frequent ones first.

    A cell that lacks a setting (the clean images know no backend) goes with any value of it.
    """
    facts = {record["key"]: _facts(record) for record in records}
    values: dict[tuple[str, Condition], dict[str, set[str]]] = {}
    for record in records:
        for m in record["measurements"]:
            known = values.setdefault((m["metric"], Condition(m["condition"])), {})
            for name, value in facts[record["key"]].items():
                known.setdefault(name, set()).add(value)
    differing = {name for known in values.values() for name, some in known.items() if len(some) > 1}
    own = [tuple((n, v) for n, v in sorted(facts[r["key"]].items()) if n in differing) for r in records]
    kinds = sorted(set(own), key=lambda kind: (-own.count(kind), kind))
    return [dict(kind) for kind in kinds if not any(set(kind) < set(other) for other in kinds)]


def _facts(record: Record) -> dict[str, str]:
    """What a cell's numbers depend on beside network and images."""
    facts = record["params"] | {"version": record.get("algorithm_version", 1)}
    return {name: canonical_json(value).strip('"') for name, value in facts.items()}


def _results(
    gathered: Folders,
    records: Sequence[Record],
    kinds: Mapping[str, Mapping[str, str]],
    groups: Mapping[str, Sequence[str]],
) -> Results:
    """The cells among ``records`` that were measured with one kind of settings of each task."""
    chosen = []
    for record in records:
        kind, facts = kinds[record["task"]], _facts(record)
        if all(facts.get(name, value) == value for name, value in kind.items()):
            chosen.append(record)
    part = gathered.part({record["key"] for record in chosen})
    return Results(part, matching(groups, [str(record["model"]) for record in chosen]))


def _known_to(results: Results, column: Column) -> Column:
    """The column, with gaps for models that these results do not have."""
    labels, of = set(results.labels), column.of
    return replace(column, of=lambda label: of(label) if label in labels else None)


def _setting(kind: Mapping[str, str]) -> str:
    """ "steps 50", for the head of a column."""
    return ", ".join(f"{name} {value[:LONGEST]}" for name, value in kind.items())


def _told_apart(found: Sequence[tuple[str, Column]], labels: Sequence[str]) -> list[Column]:
    """The columns of one name, each with its settings where these make it another number."""
    by_values: dict[tuple[float | None, ...], tuple[str, Column]] = {}
    for setting, column in found:
        values = tuple(None if (e := column.of(label)) is None else e.value for label in labels)
        by_values.setdefault(values, (setting, column))
    if len(by_values) == 1:
        return [column for _, column in by_values.values()]
    return [replace(column, name=f"{column.name} [{setting}]") for setting, column in by_values.values()]


def _place(column: Column, label: str) -> tuple[bool, float]:
    """The best first, gaps last."""
    found = column.of(label)
    value = 0.0 if found is None else found.value
    return found is None, value if column.lower_is_better else -value


def _pixels(results: Results, label: str) -> str:
    """The size of the images that a model was measured on: what corruptions acted on and eps counts in."""
    cells = (cell for task in results.tasks for cell in results.cells(task, label))
    sizes = {canonical_json((cell["protocol"].get("geometry") or {}).get("size", "")) for cell in cells}
    return "; ".join(sorted(size.strip('[]"').replace(",", " x ") for size in sizes))


def _head(results: Results, label: str) -> str:
    return "; ".join(dict.fromkeys(head.split(",")[0] for head in results.heads(label)))


def _described(record: Record) -> str:
    one = _images(record)
    limit = "all images" if one["limit"] is None else f"LIMITED to {one['limit']} images"
    return f"{one['name']}, {one['split']} split, {limit}, fingerprint {str(one['fingerprint'])[:16]}."


def _section(number: int, board: Board, labels: Sequence[str]) -> Section:
    numbers = {
        column.name: [
            None if (e := column.of(label)) is None else Number(e.value, e.low, e.high, column.unit) for label in labels
        ]
        for column in board.columns
    }
    shown = {f"{c.name}{' %' if c.unit == 'percent' else ''}": numbers[c.name] for c in board.columns}
    texts = {name: [board.beside[label][i] for label in labels] for i, name in enumerate(("pixels", "head"))}
    beside = {name: column for name, column in texts.items() if len(set(column)) > 1}
    counts = sorted({e.n for c in board.columns for label in labels if (e := c.of(label)) is not None})
    n = f"n = {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))}" if counts else ""
    terms = {term: text for column in board.columns for term, text in column.terms.items()}
    scores = _table(f"scores_{number}", "Scores", n, labels, {**beside, **shown}, explained(terms))
    ranks = _table(f"ranks_{number}", "Ranks", f"rank of {len(board.called)}", labels, board.ranks(labels), TIED)
    return Section(f"Protocol {number}: {board.title}", [board.images], [scores, ranks])


def _table(
    name: str, title: str, corner: str, labels: Sequence[str], columns: Mapping[str, Sequence[Entry]], caption: str
) -> Table:
    rows = [Row(label, [column[i] for column in columns.values()]) for i, label in enumerate(labels)]
    return Table(name, title, corner, [*columns], rows, caption)


def clearly_better(columns: Sequence[Column], labels: Sequence[str]) -> list[NDArray[np.bool_]]:
    """Of each column, whether the model of a row is clearly better than that of a column, (M, M); see RANKS."""
    found = [_pairs([column.of(label) for label in labels]) for column in columns]
    upper = np.triu_indices(len(labels), 1)
    p = [pairs[0] for pairs in found]
    adjusted = holm(np.concatenate([one[upper] for one in p])) if p else np.zeros(0)
    better = []
    for place, (column, (own, change, apart)) in enumerate(zip(columns, found, strict=True)):
        own[upper] = adjusted[place * len(upper[0]) : (place + 1) * len(upper[0])]
        own = np.where(np.triu(np.ones_like(apart), 1), own, own.T)
        better.append(
            ((own < ALPHA) | (np.isnan(own) & apart)) & ((change < 0) if column.lower_is_better else (change > 0))
        )
    return better


def _pairs(
    estimates: Sequence[Estimate | None],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """p, difference, and whether its interval leaves 0 out, of every two (M, M); NaN and False where not known."""
    m = len(estimates)
    p, change, apart = np.full((m, m), np.nan), np.full((m, m), np.nan), np.zeros((m, m), dtype=bool)
    paired = [i for i, e in enumerate(estimates) if e is not None and e.shares is not None]
    alike = [i for i in paired if _same_images(estimates[i], estimates[paired[0]])]
    if len(alike) > 1:
        found_of = [e.shares.values for i in alike if (e := estimates[i]) is not None and e.shares is not None]
        values = np.array(found_of).T.astype(float)
        p[np.ix_(alike, alike)] = all_pairs(values)
        means = values.mean(axis=0)
        change[np.ix_(alike, alike)] = means[:, None] - means
    quick = set(alike)
    for i, j in combinations(range(m), 2):
        found = None if {i, j} <= quick else difference(estimates[i], estimates[j])
        if found is not None:
            p[i, j] = p[j, i] = found.p
            change[i, j], change[j, i] = found.difference, -found.difference
            apart[i, j] = apart[j, i] = found.low > 0 or found.high < 0
    return p, change, apart


def _same_images(one: Estimate | None, other: Estimate | None) -> bool:
    if one is None or other is None or one.shares is None or other.shares is None:
        return False
    return one.data == other.data and one.shares.ids.equals(other.shares.ids)
