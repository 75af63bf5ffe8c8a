"""What a report says, before it is Markdown or HTML: the verdict, a section a task, and the provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coss_eval.reports import headline, provenance, verdict
from coss_eval.reports.by_task import task_report
from coss_eval.reports.estimates import Estimate, could_have_seen, difference
from coss_eval.reports.figures import OF_ALL
from coss_eval.reports.layout import Number, Row, Table, transposed, with_best
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, Comparisons, Score, TaskScores, comparable
from coss_eval.statistics import SEEDS_FOR_P

FOLDED = "Protocol and notes"


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, figures with their captions by name, tables, and what is folded away: the protocol."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    folded_tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    warnings: list[str]
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in (*section.tables, *section.folded_tables)]


def build(results: Results, baseline: str | None = None, figures: Sequence[str] = ()) -> Document:
    """The whole report. ``baseline`` names the checkpoint that differences refer to (default: the first)."""
    base = resolve_baseline(results, baseline)
    columns = headline.columns(results)
    sections = [_verdict(results, columns, base, figures)] if columns else []
    sections += [_section(results, task, base, figures) for task in results.tasks]
    across = _of_all([name for name in OF_ALL if name != "forest"], figures)
    sections += [Section("Across tasks", figures=across)] if across else []
    sections.append(Section("Provenance", [provenance.STATISTICS], provenance.tables(results)))
    data = ", ".join(dict.fromkeys(str(name) for name in results.frame["data"].dropna()))
    subtitle = f"{_counted(results)} on {data or 'unnamed data'}{_what_is_compared(results)}"
    return Document("coss-eval report", subtitle, provenance.warnings(results), sections)


def _verdict(results: Results, columns: Sequence[Column], base: str, figures: Sequence[str]) -> Section:
    """Three sentences, a forest plot, the headline's table, and the differences in it."""
    differences = difference_table(results, TaskScores("headline", "Headline", "", [*columns]), base)
    tables = [headline_table(results, columns), *([] if differences is None else [transposed(differences)])]
    if results.groups.members:
        tables.append(headline_table(results, columns, each=True))
    chances = {results.chance(label) for label in results.labels} - {None}
    chance = [f"Chance level: {Number(chances.pop() or 0.0).main} %."] if len(chances) == 1 else []
    return Section("Verdict", [*verdict.sentences(results, columns), *chance], tables, _of_all(["forest"], figures))


def _of_all(names: Iterable[str], figures: Sequence[str]) -> dict[str, str]:
    """The captions of the figures of several tasks that are drawn."""
    return {name: OF_ALL[name][1] for name in names if name in figures}


def _counted(results: Results) -> str:
    """ "2 methods (6 checkpoints) and 1 checkpoint"."""
    members = results.groups.members
    alone = len(results.labels) - len(members)
    runs = sum(map(len, members.values()))
    parts = [f"{len(members)} method{_s(len(members))} ({runs} checkpoints)"] if members else []
    parts += [f"{alone} checkpoint{_s(alone)}"] if alone or not members else []
    return " and ".join(parts)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _what_is_compared(results: Results) -> str:
    """What a reader must know before any difference: whether they are of methods or of checkpoints."""
    seeds = [len(texts) for texts in results.groups.members.values()]
    if not seeds:
        alone = ". One seed each: differences and p-values compare these checkpoints, not the methods that made them"
        return f"{alone}." if len(results.labels) > 1 else ""
    found = ". Methods are compared over their seeds: intervals are about new seeds and new images"
    found += f"; fewer than {SEEDS_FOR_P} seeds give an interval and no p" if min(seeds) < SEEDS_FOR_P else ""
    alone = "; what has one seed is shown beside them, without an interval of its difference from them"
    return f"{found}{alone if len(results.labels) > len(seeds) else ''}."


def _section(results: Results, task: str, base: str, figures: Sequence[str]) -> Section:
    report = task_report(task)
    specs = report.scores(results)
    shared, own = results.notes(task)
    lines = [line for line in (provenance.protocol_line(results, task), *map(_sentence, shared)) if line]
    noted = [_notes_table(task, results.checkpoints_of(task), own)] if own else []
    tables = [table for spec in specs for table in task_tables(results, spec, base)]
    tables += [table for maker in report.tables if (table := maker(results)) is not None]
    drawn = {name: caption for name, (_, caption) in report.figures.items() if name in figures}
    return Section(specs[0].title, [], tables, drawn, lines, noted)


def _sentence(note: str) -> str:
    """A note with a capital letter and a full stop, but for names that begin small, such as kNN."""
    first = note.split(" ")[0]
    capital = note[:1].upper() + note[1:] if first.islower() and first.isalpha() else note
    return capital if capital.endswith((".", "!", "?")) else f"{capital}."


def _notes_table(task: str, labels: Sequence[str], own: Mapping[str, Mapping[str, str]]) -> Table:
    """What the cells of a task noted that differs between checkpoints: a row each, a column a note."""
    rows = [Row(label, [values.get(label, "") for values in own.values()]) for label in labels]
    return Table(f"{task}_notes", "Noted of each checkpoint", "checkpoint", list(own), rows)


def long_tables(results: Results) -> list[Table]:
    """Tables that no page shows."""
    makers = (maker for task in results.tasks for maker in task_report(task).files)
    return [table for maker in makers if (table := maker(results)) is not None]


def resolve_baseline(results: Results, baseline: str | None) -> str:
    """The label of the checkpoint that differences refer to. Raises UsageError for a name that is not there."""
    return results.labels[0] if baseline is None else results.named(baseline, "baseline")


def headline_table(results: Results, scores: Sequence[Column], *, each: bool = False) -> Table:
    """One row a method or checkpoint, or ``each`` checkpoint. The corner has the usual n, heads have others."""
    labels = [text for one in results.labels for text in results.members(one)] if each else results.labels
    found = {label: [score.of(label) for score in scores] for label in labels}
    n_texts = [results.n_text(e.n for e in each if e is not None) for each in zip(*found.values(), strict=True)]
    usual = max(n_texts, key=n_texts.count, default="")
    units = [" %" if score.unit == "percent" else "" for score in scores]
    names = [
        f"{score.name}{unit}" + (f" ({n})" if n != usual else "")
        for score, unit, n in zip(scores, units, n_texts, strict=True)
    ]
    heads = {label: "; ".join(dict.fromkeys(h.split(",")[0] for h in results.heads(label))) for label in found}
    known = any(heads.values())  # not where nothing but probes was run
    first = {label: [head] if known else [] for label, head in heads.items()}
    by_score = [with_best([_number(score, found[label][i]) for label in found]) for i, score in enumerate(scores)]
    rows = [Row(label, [*first[label], *(each[i] for each in by_score)]) for i, label in enumerate(found)]
    columns = ["head", *names] if known else names
    if each:
        return Table("headline_checkpoints", "Headline of each checkpoint", usual, columns, rows)
    return Table("headline", "Headline", usual, columns, rows, headline.caption(scores))


def task_tables(results: Results, spec: TaskScores, base: str) -> list[Table]:
    """The checkpoints side by side, the baseline first, and the differences from it; none where none has a number."""
    measured = [label for label in results.labels if any(s.of(label) is not None for s in spec.scores)]
    if not measured:
        return []
    labels = sorted(measured, key=lambda label: label != base)  # stable: the others keep their order
    found = [[score.of(label) for label in labels] for score in spec.scores]
    corner = f"{spec.quantity}, {results.n_text((e.n for row in found for e in row if e is not None), spec.task)}"
    rows = [
        Row(s.name, with_best([_number(s, e) for e in row]), s.group) for s, row in zip(spec.scores, found, strict=True)
    ]
    columns = [f"{label} (baseline)" if label == base and len(labels) > 1 else label for label in labels]
    absent = [label for label in results.labels if label not in labels]
    gaps = [f"Not measured here: {', '.join(absent)}."] if absent else []
    if base in absent and len(labels) > 1:
        gaps.append(f"No differences: the baseline {base} is not among these; --baseline names another.")
    caption = " ".join([spec.caption, *gaps]).strip()
    tables = [Table(spec.name, spec.title, corner, columns, rows, caption)]
    differences = difference_table(results, spec, base)
    return tables if differences is None else [*tables, differences]


def difference_table(results: Results, spec: TaskScores, base: str) -> Table | None:
    """Every other one minus the baseline, in points, p adjusted over the table; None where nothing can be compared."""
    tested = comparable(spec.scores, results.family)
    scores = [score for score in tested if score.of(base) is not None]
    others = [label for label in results.labels if label != base and any(s.of(label) is not None for s in scores)]
    if not scores or not others:
        return None
    family = Comparisons(tested, results.family)  # also where the baseline has a gap
    rows = [
        Row(s.name, [_change(s, base, label, family.p(s, label, base)) for label in others], s.group) for s in scores
    ]
    title = f"{spec.title}: difference from {base}"
    n = results.n_text(e.n for score in scores for label in others if (e := score.of(label)) is not None)
    points = [score for score in scores if score.unit == "percent"]
    unit = "points" if len(points) == len(scores) else "points of %, else as it is"
    corner = f"minus {base} ({unit}), " + (n if results.groups.members else f"p between checkpoints, {n}")
    seen = [could_have_seen(score.of(label), score.of(base)) for score in points for label in others]
    power = _power([x for x in seen if x is not None])
    return Table(f"{spec.name}_differences", title, corner, others, rows, power, gap="without a number on both sides")


def _power(seen: Sequence[float]) -> str:
    """The differences that the data of a table could have shown."""
    if not seen:
        return ""
    low, high = (Number(x).main for x in (min(seen), max(seen)))
    shown = low if low == high else f"{low} to {high}"
    return f"Smallest true difference that would be found 8 times in 10, before p is adjusted: {shown} points."


def _number(score: Score, estimate: Estimate | None) -> Number | None:
    if estimate is None:
        return None
    bounds = estimate.value, estimate.low, estimate.high
    return Number(*bounds, score.unit, lower_is_better=score.lower_is_better)


def _change(score: Score, base: str, label: str, p: float | None) -> Number | None:
    found = difference(score.of(label), score.of(base))
    if found is None:
        return None
    bounds = found.difference, found.low, found.high
    return Number(*bounds, unit=score.unit, p=p, signed=True, lower_is_better=score.lower_is_better)
