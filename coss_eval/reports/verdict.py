"""The verdict that a report begins with: what is best on what, by how much, and how sure that is. No torch.

Only what has a better and a worse is ranked (shares of images, not redundancy), and only among those that saw the same
images. A lead is told with the p that its difference has in the headline's own table; where there is none, for want of
seeds, with its interval. What is not told apart is called a tie with the most that it may be; a gap is never ranked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from coss_eval.reports.estimates import Estimate, difference
from coss_eval.reports.layout import Number
from coss_eval.reports.results import Results
from coss_eval.reports.scores import Column, Comparisons, comparable
from coss_eval.statistics import SEEDS_FOR_P

SHOWN = 3  # names or scores in a list; the tables have them all


@dataclass(frozen=True)
class Standing:
    """Who leads on one ``score``, and by how much: over each other one that saw the same images, the next best first.

    ``gaps``: those that were not measured on it.
    """

    score: str
    leader: str
    leads: Mapping[str, Number]
    gaps: tuple[str, ...] = ()

    @property
    def next(self) -> str:
        return next(iter(self.leads))

    @property
    def ties(self) -> list[str]:
        """Those that the leader is not told apart from: by p where there is one, else by the interval."""
        return [label for label, lead in self.leads.items() if lead.reading not in ("higher", "lower")]


def sentences(results: Results, columns: Sequence[Column]) -> list[str]:
    """The verdict on a store by its headline's ``columns``: three sentences, fewer where there is less to say."""
    ranked = ranked_labels(results)
    scores = [column for column in columns if column.unit == "percent" and not column.reference]
    if not scores:
        return []
    untrained = _untrained(results, ranked, scores)
    if len(ranked) < 2:
        first, gaps = _of_one(ranked[0], scores, alone=len(results.labels) < 2)
        return [first, f"{untrained}{gaps}", _how_sure(results, ranked, scores)]
    found = standings(scores, ranked, results.family, {label: results.datasets(label) for label in ranked})
    second = f"{untrained}{_ties_and_gaps(found)}"
    return [_best([s for s in found if s.leads]), second, _how_sure(results, ranked, scores)]


def ranked_labels(results: Results) -> list[str]:
    """Whom the verdict ranks: methods of several seeds where there are any, else checkpoints; untrained networks last.

    Those are references: they are left out unless there is nothing else.
    """
    labels = [label for label in results.labels if label in results.groups.members] or results.labels
    trained = [label for label in labels if not _is_untrained(results, label)]
    return trained or labels


def standings(
    scores: Sequence[Column],
    labels: Sequence[str],
    everyone: Sequence[str] = (),
    datasets: Mapping[str, Collection[str]] | None = None,
) -> list[Standing]:
    """The standing on each score, once for each set of images; one that a single one of ``labels`` saw has no leads.

    p is adjusted as in the headline's table, over all pairs of ``everyone`` (default: of ``labels``). ``datasets``
    names what each label's images are of, which a score is called after where there are several.
    """
    family = Comparisons(comparable(scores, everyone or labels), everyone or labels)
    names = {label: ", ".join(sorted((datasets or {}).get(label, ()))) for label in labels}
    found = []
    for score in scores:
        for there in _by_images({label: score.of(label) for label in labels}):
            where = names[next(iter(there))]
            gaps = tuple(label for label in labels if names[label] == where and label not in there)
            first, *others = sorted(there, key=lambda label: there[label].value, reverse=not score.lower_is_better)
            leads = {other: _lead(score, there[first], there[other], family.p(score, first, other)) for other in others}
            name = score.name + (f" on {where}" if len(set(names.values())) > 1 else "")
            found.append(Standing(name, first, leads, gaps))
    return found


def _by_images(found: Mapping[str, Estimate | None]) -> Collection[Mapping[str, Estimate]]:
    """The numbers that there are, those of the same images together."""
    groups: dict[str | None, dict[str, Estimate]] = {}
    for label, estimate in found.items():
        if estimate is not None:
            groups.setdefault(estimate.data, {})[label] = estimate
    return groups.values()


def _lead(score: Column, one: Estimate, other: Estimate, p: float | None) -> Number:
    """How far ``one`` is ahead, always as a gain."""
    d = difference(one, other) if not score.lower_is_better else difference(other, one)
    assert d is not None
    return Number(d.difference, d.low, d.high, p=p, signed=True)


def _best(found: Sequence[Standing]) -> str:
    """ "co-byol is best on clean top-1 and corrupted: ahead of all, of the next, byol, by +2.0 [+1.1, +2.8] ..."."""
    if not found:
        return "Nothing can be ranked: no two of them have numbers of the same images on one score."
    winners: dict[str, list[Standing]] = {}
    for standing in found:
        if not standing.ties:
            winners.setdefault(standing.leader, []).append(standing)
    if not winners:
        names = "the one score" if len(found) == 1 else f"any of the {len(found)} scores"
        return f"There is no clear best: on {names} of the headline, nothing leads all by more than its uncertainty."
    parts = []
    for leader, mine in winners.items():
        first = mine[0]
        lead = first.leads[first.next]
        on = f"all {len(mine)} scores" if len(mine) == len(found) > SHOWN else listed([s.score for s in mine])
        how = f" ({lead.p_text})" if lead.p_text else f" (an interval and no p: fewer than {SEEDS_FOR_P} seeds)"
        of = f", on {first.score}" if len(mine) > 1 else ""
        parts.append(
            f"{leader} is best on {on}: {lead.main} {lead.interval} points over the next, {first.next}{of}{how}"
        )
    return f"{'; '.join(parts)}."


def _ties_and_gaps(found: Sequence[Standing]) -> str:
    """What is not told apart, by how much at most, and what is missing."""
    tied = [standing for standing in found if standing.ties]
    parts = [f"on {s.score} {listed([s.leader, *s.ties])}{_at_most(s)}" for s in tied[:SHOWN]]
    more = f"; and so on {len(tied) - SHOWN} more" if len(tied) > SHOWN else ""
    text = (
        [f"Not told apart: {'; '.join(parts)}{more}."]
        if tied
        else ["Nothing is tied."]
        if any(s.leads for s in found)
        else []
    )
    gaps: dict[str, list[str]] = {}
    for standing in found:
        for label in standing.gaps:
            gaps.setdefault(label, []).append(standing.score)
    missing = [f"{label} on {listed(scores)}" for label, scores in gaps.items()]
    return " ".join(
        [*text, f"Not measured, so not ranked: {listed(missing, '; ')}." if gaps else "Nothing is missing."]
    )


def _at_most(standing: Standing) -> str:
    """ " (at most 2.1 points behind byol)"; empty where a tie has no interval."""
    ties = [standing.leads[label] for label in standing.ties]
    if not all(lead.interval for lead in ties):
        return " (no interval of their difference)"
    most = Number(max(lead.high or 0.0 for lead in ties)).main
    return f" (at most {most} points behind {standing.leader})"


def _how_sure(results: Results, ranked: Sequence[str], scores: Sequence[Column]) -> str:
    """What the intervals and p-values are about, and who was left out of the ranking."""
    n = results.n_text(e.n for score in scores for label in ranked if (e := score.of(label)) is not None)
    seeds = [len(results.groups.members[label]) for label in ranked if label in results.groups.members]
    if not seeds and len(ranked) < 2:
        return f"How sure: intervals are about new images ({n}); one seed says nothing of other seeds."
    if not seeds:
        text = (
            f"How sure: one seed each ({n}), so checkpoints are compared, not the methods that made them; "
            "another seed may turn a difference round"
        )
    else:
        span = " to ".join(map(str, dict.fromkeys([min(seeds), max(seeds)])))
        text = f"How sure: {span} seeds a method ({n}); intervals are about new seeds and new images"
        text += f", and fewer than {SEEDS_FOR_P} seeds have no p" if min(seeds) < SEEDS_FOR_P else ""
    left = [label for label in results.labels if label not in ranked]
    untrained = [label for label in left if _is_untrained(results, label)]
    single = [label for label in left if label not in untrained]
    text += f"; {listed(single)}, of one seed, {_is(single)} not ranked with them" if single else ""
    return text + (f"; {listed(untrained)} {_is(untrained)} the reference and not ranked." if untrained else ".")


def _untrained(results: Results, ranked: Sequence[str], scores: Sequence[Column]) -> str:
    """Where an untrained network is ahead of a ranked one or not told apart from it: training shows nothing there."""
    references = [label for label in results.labels if label not in ranked and _is_untrained(results, label)]
    family = Comparisons(comparable(scores, results.family), results.family)
    ahead: dict[str, list[str]] = {}
    level: dict[str, list[str]] = {}
    for score, label in product(scores, ranked):
        mine, found = score.of(label), [(name, score.of(name)) for name in references]
        readings = [
            _lead(score, mine, other, family.p(score, label, name)).reading
            for name, other in found
            if mine is not None and other is not None and mine.data == other.data
        ]
        if "lower" in readings:
            ahead.setdefault(label, []).append(score.name)
        elif any(reading not in ("higher", "") for reading in readings):
            level.setdefault(label, []).append(score.name)
    parts = [
        f"{how} {text}" for how, of in (("ahead of", ahead), ("not told apart from", level)) for text in _alike(of)
    ]
    return f"An untrained network is {listed(parts, '; ')}. " if parts else ""


def _alike(scores: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Labels by their scores, those of the same scores in one: "byol and dino on kept"."""
    together: dict[tuple[str, ...], list[str]] = {}
    for label, names in scores.items():
        together.setdefault(tuple(names), []).append(label)
    return (f"{listed(labels)} on {listed(names)}" for names, labels in together.items())


def _is_untrained(results: Results, label: str) -> bool:
    return set(results.members(label)) <= results.untrained


def _of_one(label: str, scores: Sequence[Column], *, alone: bool) -> list[str]:
    """What there is to say of one model: its scores, and its gaps."""
    found = {score.name: score.of(label) for score in scores}
    known = [
        f"{name} {Number(e.value, e.low, e.high)} %" for name, e in list(found.items())[: SHOWN + 1] if e is not None
    ]
    gaps = [name for name, e in found.items() if e is None]
    what = "nothing" if alone else "no other trained network"
    first = f"There is {what} to compare {label} with" + (f": {', '.join(known)}." if known else ".")
    return [first, f"Not measured: {listed(gaps)}." if gaps else "Nothing is missing."]


def listed(names: Iterable[str], between: str = ", ") -> str:
    """ "a", "a and b", "a, b and c", "a, b, c and 4 more"; a name with a comma in quotes where it is not alone."""
    every = list(names)
    if len(every) > 1 and between == ", ":
        every = [f'"{name}"' if "," in name else name for name in every]
    shown = every if len(every) <= SHOWN + 1 else [*every[:SHOWN], f"{len(every) - SHOWN} more"]
    return shown[0] if len(shown) == 1 else f"{between.join(shown[:-1])} and {shown[-1]}"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
