"""Claims that were written down before any run: one score each, a contrast of methods, over training seeds.

Imports no torch. The seed is the unit: a score is one number a run, with its images' shares where they are stored, and
an interval is about other seeds of the same methods and, with shares, other images. A claim says nothing before every
arm that it compares has two seeds. All claims of a file are one family: Holm's correction runs over them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from coss_eval.errors import UsageError, unknown_name
from coss_eval.reports.estimates import Estimate, by_run, mean
from coss_eval.reports.layout import Number, Row, Table, Unit
from coss_eval.reports.results import Results
from coss_eval.statistics import (
    SEEDS_FOR_P,
    Difference,
    contrast,
    contrast_error,
    detectable,
    holm,
    p_against,
    seeds_needed,
    spread,
)
from coss_eval.store import Condition
from coss_eval.tasks import entries

Verdict = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That a weighted sum of arms' means of one score, by default CO-BYOL minus BYOL, is at least ``margin``.

    The score is the mean over the measurements of ``metric`` of a task under the conditions ``where``: each name with
    the value, or the values, that it must have; those that have no other conditions, but seeds, where there are such.
    ``data`` names the dataset where results have several.
    """

    name: str
    source: str
    task: str
    metric: str
    margin: float
    where: dict[str, Any] = field(default_factory=dict)
    contrast: dict[str, float] = field(default_factory=lambda: {"co-byol": 1.0, "byol": -1.0})
    percent: bool = True
    data: str | None = None

    def __post_init__(self) -> None:
        if not self.contrast or abs(sum(self.contrast.values())) > 1e-9:
            raise UsageError(f"the weights of the claim {self.name!r} must sum to 0, got {self.contrast}")
        if not all(w and math.isfinite(w) for w in self.contrast.values()) or not math.isfinite(self.margin):
            raise UsageError(
                f"the claim {self.name!r} needs a finite margin and finite weights other than 0, got {self.margin} and "
                f"{self.contrast}"
            )

    @property
    def unit(self) -> Unit:
        return "percent" if self.percent else "plain"

    @property
    def measured(self) -> tuple[str, str, dict[str, Any]]:
        """What the score is of: two claims may compare one score of other arms."""
        return self.task, self.metric, self.where

    @property
    def compared(self) -> str:
        """The contrast for reading: "co-byol − byol"."""
        text = " ".join(
            f"{'+' if w > 0 else '−'} {'' if abs(w) == 1 else f'{abs(w):g} '}{arm}" for arm, w in self.contrast.items()
        )
        return text.removeprefix("+ ")

    def of(self, results: Results, label: str, among: Sequence[Condition] = ()) -> Estimate | None:
        """The score of a checkpoint; None where it lacks a condition that others have, or all lack a named one.

        ``among``: the conditions that checkpoints of other results have.
        """
        found = [c for c in dict.fromkeys([*self.conditions(results), *among]) if self._is_meant(c)]
        plain = [c for c in found if set(c.without("seed")) <= set(self.where)]
        found = plain or found
        if any(not any(c.includes(**{name: v}) for c in found) for name, v in self._wanted()):
            return None
        return mean([results.estimate(label, self.task, self.metric, **c) for c in found])

    def conditions(self, results: Results) -> list[Condition]:
        """What its metric was measured under."""
        return results.conditions(self.task, self.metric)

    def _wanted(self) -> list[tuple[str, Any]]:
        """Every name of ``where`` with each of its values."""
        lists = {name: v if isinstance(v, list | tuple) else [v] for name, v in self.where.items()}
        return [(name, value) for name, values in lists.items() for value in values]

    def _is_meant(self, condition: Condition) -> bool:
        wanted = self._wanted()
        return all(any(condition.includes(**{n: v}) for n, v in wanted if n == name) for name in self.where)


@dataclass(frozen=True)
class Finding:
    """What is known of a claim: seeds by arm, and the rest once every arm has two of them.

    ``p`` is against the margin, not yet adjusted; ``seen`` the difference that these seeds show 8 times in 10;
    ``needed`` the seeds an arm that would decide if the difference is as estimated (None: more than anybody trains).
    """

    claim: Claim
    seeds: dict[str, int]
    difference: Difference | None = None
    p: float = math.nan
    seen: float | None = None
    needed: int | None = None


def finding(claim: Claim, scores: Mapping[str, ArrayLike]) -> Finding:
    """The contrast of the arms' ``scores``, one a seed (S,), or one a seed and image (S, N) of the same images."""
    values = {arm: np.asarray(scores.get(arm, []), dtype=np.float64) for arm in claim.contrast}
    seeds = {arm: len(each) for arm, each in values.items()}
    if min(seeds.values()) < 2:
        return Finding(claim, seeds)
    groups = [(w, values[arm]) for arm, w in claim.contrast.items()]
    estimate, error, df = contrast_error(groups)
    p = p_against(estimate, error, df, claim.margin)
    needed = seeds_needed(groups, estimate - claim.margin)
    return Finding(claim, seeds, contrast(groups), p, detectable(error, df), needed)


def finding_of_runs(claim: Claim, runs: Mapping[str, Sequence[Estimate]]) -> Finding:
    """``finding`` from the estimates of each arm's runs."""
    there = [arm for arm in claim.contrast if runs.get(arm)]
    return finding(claim, dict(zip(there, by_run([runs[arm] for arm in there]), strict=True)) if there else {})


def findings_in(claims: Sequence[Claim], results: Results) -> list[Finding]:
    """What a results folder says of each claim; its arms are the methods or checkpoints there.

    Raises UsageError for what nothing is called: a claim of it would stay undecided for ever.
    """
    for claim in claims:
        if claim.task not in (known := list(dict.fromkeys([*entries(), *results.tasks]))):
            raise unknown_name(f"task in the claim {claim.name!r}", claim.task, known)
        metrics = list(dict.fromkeys(metric for metric, _ in results.found(claim.task)))
        if metrics and claim.metric not in metrics:
            raise unknown_name(f"metric of {claim.task} in the claim {claim.name!r}", claim.metric, metrics)
    return [finding_of_runs(claim, _runs_of(claim, results)) for claim in claims]


def _runs_of(claim: Claim, results: Results) -> dict[str, list[Estimate]]:
    """The score of every run of each arm. Raises UsageError for a run in two arms, and for arms of other images."""
    found: dict[str, list[Estimate]] = {}
    arm_of: dict[str, str] = {}
    for arm in claim.contrast:
        members = results.members(_row_of(claim, results, arm))
        for member in members:
            if arm_of.setdefault(member, arm) != arm:
                raise UsageError(
                    f"the claim {claim.name!r} has {member} in both {arm_of[member]} and {arm}; name arms of other runs"
                )
        found[arm] = [score for member in members if (score := claim.of(results, member)) is not None]
    if len({score.data for scores in found.values() for score in scores}) > 1:
        raise UsageError(
            f"the claim {claim.name!r} compares scores of other images ({', '.join(found)}); evaluate all arms on the "
            "same ones"
        )
    return found


def _row_of(claim: Claim, results: Results, arm: str) -> str:
    """The method or checkpoint that an arm names; one run of a method is that run alone."""
    methods = results.groups.methods
    found = [
        label
        for label in dict.fromkeys([*results.labels, *results.checkpoints])
        if arm in (label, methods.get(label)) or (label not in results.groups.members and arm in results.models(label))
    ]
    if not found:
        known = [methods.get(label, label) for label in results.labels]
        raise unknown_name(f"method in the claim {claim.name!r}", arm, list(dict.fromkeys(known)))
    found = [label for label in found if claim.data is None or claim.data in results.datasets(label)]
    if len(found) != 1:
        data = sorted({name for label in results.labels for name in results.datasets(label)})
        raise UsageError(f"the claim {claim.name!r} needs data: one of {', '.join(data)}; {arm} has {len(found)} rows")
    return found[0]


def verdicts(findings: Sequence[Finding], level: float = 0.95) -> list[tuple[Verdict, float]]:
    """Each claim's verdict with its p, adjusted by Holm over all of them; a claim without data counts as p = 1.

    Supported: the difference is above the margin; refuted: below it.
    """
    adjusted = holm([1.0 if math.isnan(found.p) else found.p for found in findings])
    answers: list[tuple[Verdict, float]] = []
    for found, p in zip(findings, adjusted, strict=True):
        if found.difference is None or p >= 1 - level:
            answers.append(("undecided", float(p)))
        else:
            answers.append(("supported" if found.difference.difference > found.claim.margin else "refuted", float(p)))
    return answers


def claims_table(
    findings: Sequence[Finding], planned: Mapping[str, int] | None = None, hours: Mapping[str, float] | None = None
) -> Table:
    """A row a claim; ``planned`` has the seeds that each arm is to have, ``hours`` what a run of it takes."""
    rows = []
    for i, (found, (verdict, p)) in enumerate(zip(findings, verdicts(findings), strict=True), 1):
        claim, d = found.claim, found.difference
        seeds = ", ".join(
            str(n) if planned is None else f"{n} of {planned.get(arm, 0)}" for arm, n in found.seeds.items()
        )
        shown = None if d is None else Number(d.difference, d.low, d.high, claim.unit, signed=True)
        margin = Number(claim.margin, unit=claim.unit).main
        seen = None if found.seen is None else Number(found.seen, unit=claim.unit)
        enough = min(found.seeds.values()) >= SEEDS_FOR_P
        answer = f"{verdict}, {Number(0.0, p=p).p_text}" if enough and not math.isnan(found.p) else verdict
        rows.append(
            Row(
                f"{i} {claim.name}",
                [claim.compared, shown, margin, answer, seen, seeds, still_needed(found, verdict, hours)],
            )
        )
    caption = (
        "Difference of the means over seeds with its 95 % interval, about new seeds and, where each image's "
        "verdict is stored, new images (readers nested in methods, Satterthwaite's degrees of freedom); percentage "
        "points where the score is an accuracy. Supported: above the margin, refuted: below it, by Student's test "
        f"at 5 % with Holm's correction over all claims; p is shown from {SEEDS_FOR_P} seeds on. Could have seen: the "
        "difference that these seeds show 8 times in 10. Seeds needed: of each arm, if difference and spread are "
        "as they seem. Scores, contrasts and margins were fixed before any run."
    )
    columns = ["compared", "difference", "margin", "verdict", "could have seen", "seeds done", "seeds needed"]
    return Table("claims", "The claims", "claim", columns, rows, caption)


def still_needed(found: Finding, verdict: Verdict, hours: Mapping[str, float] | None) -> str:
    """ "12 each, about 30 hours"; empty where the claim is decided or has too few seeds to tell."""
    if verdict != "undecided" or found.difference is None:
        return ""
    if found.needed is None:
        return "more than 200 each"
    missing = {arm: max(0, found.needed - seeds) for arm, seeds in found.seeds.items()}
    known = hours is not None and all(arm in hours for arm, count in missing.items() if count)
    total = sum(count * hours[arm] for arm, count in missing.items() if count) if known and hours is not None else 0.0
    return f"{found.needed} each" + (f", about {total:.0f} hours" if total else "")


def claim_lines(findings: Sequence[Finding], hours: Mapping[str, float] | None = None) -> list[str]:
    """The answers for a terminal, a few lines a claim; what was not seen is said with the most that it may be."""
    lines = []
    for i, (found, (verdict, p)) in enumerate(zip(findings, verdicts(findings), strict=True), 1):
        claim, d = found.claim, found.difference
        margin = Number(claim.margin, unit=claim.unit).main
        seeds = " and ".join(map(str, found.seeds.values()))
        lines.append(f"{i} {claim.name}: {verdict.upper()}")
        lines.append(f"    {claim.compared} at least {margin}; {seeds} seeds")
        if d is None:
            where = str(Condition(claim.where))
            unmeasured = f"no run here has {claim.metric} of {claim.task}" + (f" under {where}" if where else "")
            lines.append(f"    {'every arm needs two seeds or more' if any(found.seeds.values()) else unmeasured}")
            continue
        shown = Number(d.difference, d.low, d.high, claim.unit, signed=True)
        p_text = Number(0.0, p=p).p_text if min(found.seeds.values()) >= SEEDS_FOR_P else ""
        lines.append("    " + ", ".join(part for part in (str(shown), shown.reading, p_text) if part))
        seen = Number(found.seen or 0.0, unit=claim.unit).main
        needed = still_needed(found, verdict, hours)
        lines.append(f"    these seeds show {seen} 8 times in 10" + (f"; seeds needed: {needed}" if needed else ""))
    return lines


def scores_table(
    claims: Sequence[Claim], scores: Mapping[str, Mapping[str, Sequence[float]]], arms: Sequence[str]
) -> Table:
    """A row an arm, a column a claim's score: the mean over seeds with Student's interval; exploratory."""
    rows, fewer = [], list[str]()
    for arm in arms:
        entries: list[Number | None] = []
        most = max((len(scores.get(c.name, {}).get(arm, [])) for c in claims), default=0)
        for claim in claims:
            values = scores.get(claim.name, {}).get(arm, [])
            if 0 < len(values) < most:
                fewer.append(f"{claim.name} of {arm} ({len(values)})")
            over = spread(values) if values else None
            several = over is not None and not math.isnan(over.low)
            low, high = (over.low, over.high) if over is not None and several else (None, None)
            entries.append(None if over is None else Number(over.mean, low, high, claim.unit))
        rows.append(Row(f"{arm} ({most} {'seed' if most == 1 else 'seeds'})", entries))
    caption = "Means over training seeds, Student's 95 % interval over seeds. All but the claims above is exploratory."
    caption += f" Of fewer seeds than the row's: {', '.join(fewer)}." if fewer else ""
    return Table("scores", "Scores by method", "mean over seeds", [claim.name for claim in claims], rows, caption)
