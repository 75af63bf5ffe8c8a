"""Claims that were written down before any run: one score each, a contrast of methods, over training seeds.

Imports no torch. The seed is the unit: a score is one number a run, and an interval is about other seeds of the same
methods on the same images. A claim says nothing before every arm that it compares has two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coss_eval.errors import UsageError
from coss_eval.reports.layout import Number, Row, Table, Unit
from coss_eval.statistics import Difference, contrast, spread
from coss_eval.store import Condition, Record


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A weighted sum of arms' means of one score: by default CO-BYOL minus BYOL.

    The score is the mean over the measurements of ``metric`` of a task under the conditions ``where``: each name with
    the value, or the values, that it must have. ``margin`` is the smallest difference that would matter.
    """

    name: str
    source: str
    task: str
    metric: str
    margin: float
    where: dict[str, Any] = field(default_factory=dict)
    contrast: dict[str, float] = field(default_factory=lambda: {"co-byol": 1.0, "byol": -1.0})
    percent: bool = True

    def __post_init__(self) -> None:
        if not self.contrast or abs(sum(self.contrast.values())) > 1e-9:
            raise UsageError(f"the weights of the claim {self.name!r} must sum to 0, got {self.contrast}")

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

    def score(self, records: Sequence[Record]) -> float | None:
        """The score of one run from the stored records of its cells; None where it was not measured."""
        found = [
            m["value"]
            for record in records
            if record["task"] == self.task
            for m in record["measurements"]
            if m["metric"] == self.metric and self._is_meant(Condition(m["condition"]))
        ]
        return None if not found or None in found else sum(found) / len(found)

    def _is_meant(self, condition: Condition) -> bool:
        wanted = {name: v if isinstance(v, list | tuple) else [v] for name, v in self.where.items()}
        return all(any(condition.includes(**{name: v}) for v in values) for name, values in wanted.items())


@dataclass(frozen=True)
class Finding:
    """What is known of a claim: seeds by arm, and the difference once every arm has two of them."""

    claim: Claim
    seeds: dict[str, int]
    difference: Difference | None


def finding(claim: Claim, scores: Mapping[str, Sequence[float]]) -> Finding:
    """The contrast of the arms' ``scores``, one a seed: Satterthwaite's interval for seeds of unequal spread."""
    values = {arm: scores.get(arm, []) for arm in claim.contrast}
    ready = all(len(each) >= 2 for each in values.values())
    found = contrast([(w, values[arm]) for arm, w in claim.contrast.items()]) if ready else None
    return Finding(claim, {arm: len(each) for arm, each in values.items()}, found)


def claims_table(findings: Sequence[Finding], planned: Mapping[str, int]) -> Table:
    """A row a claim; ``planned`` has the seeds that each arm is to have."""
    rows = []
    for i, found in enumerate(findings, 1):
        claim, d = found.claim, found.difference
        seeds = ", ".join(f"{n} of {planned.get(arm, 0)}" for arm, n in found.seeds.items())
        shown = None if d is None else Number(d.difference, d.low, d.high, claim.unit, signed=True)
        margin = Number(claim.margin, unit=claim.unit).main
        rows.append(Row(f"{i} {claim.name}", [claim.compared, shown, margin, seeds]))
    caption = (
        "Difference of the means over seeds with its 95 % interval over seeds (Satterthwaite's degrees of freedom); "
        "percentage points where the score is an accuracy. Scores, contrasts and margins were fixed before any run. "
        "No p-value: too few seeds say nothing either way."
    )
    return Table("claims", "The claims", "claim", ["compared", "difference", "margin", "seeds done"], rows, caption)


def scores_table(
    claims: Sequence[Claim], scores: Mapping[str, Mapping[str, Sequence[float]]], arms: Sequence[str]
) -> Table:
    """A row an arm, a column a claim's score: the mean over seeds with Student's interval; exploratory."""
    rows = []
    for arm in arms:
        entries: list[Number | None] = []
        for claim in claims:
            values = scores.get(claim.name, {}).get(arm, [])
            over = spread(values) if values else None
            several = over is not None and not math.isnan(over.low)
            low, high = (over.low, over.high) if over is not None and several else (None, None)
            entries.append(None if over is None else Number(over.mean, low, high, claim.unit))
        most = max((len(scores.get(c.name, {}).get(arm, [])) for c in claims), default=0)
        rows.append(Row(f"{arm} ({most} {'seed' if most == 1 else 'seeds'})", entries))
    caption = "Means over training seeds, Student's 95 % interval over seeds. All but the claims above is exploratory."
    return Table("scores", "Scores by method", "mean over seeds", [claim.name for claim in claims], rows, caption)
