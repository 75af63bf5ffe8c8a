"""Tables beside a task's own: the median smallest eps, the probe's strength, the moved representation, damage by level.

Numbers that do not belong under the heading of the task's table, since they are no accuracies of the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from coss_eval.reports.layout import Number, Row, Table
from coss_eval.reports.results import Estimate, Results, aligned
from coss_eval.reports.scores import (
    KEPT,
    Unit,
    attack_families,
    attack_name,
    attack_rows,
    eps_text,
    kept_of,
    mean_of,
    norm_name,
    site_order,
)
from coss_eval.statistics import median_interval
from coss_eval.store import column_name


def tables(results: Results, task: str) -> list[Table]:
    """The further tables of a task, those that the store has numbers for."""
    makers: dict[str, tuple[Callable[[Results], Table | None], ...]] = {
        "attacks": (median_eps, by_strength, moved),
        "internal": (damage,),
    }
    return [table for maker in makers.get(task, ()) if (table := maker(results)) is not None]


def median_eps(results: Results) -> Table | None:
    """The median smallest eps that breaks an image, one row an attack; "> 8/255" where more than half stand at it."""
    families = attack_families(results)
    rows = [
        Row(
            f"{attack_name(attack)}, {norm_name(norm)}",
            [_median_text(results, label, attack, norm) for label in results.labels],
        )
        for attack, norm in families
    ]
    rows = [row for row in rows if any(row.entries)]
    caption = (
        "Over the images that are right without the attack: the smallest eps of the list that breaks an image, its "
        "median and 95 % interval by ranks; >: more than half stand at the largest."
    )
    measured = results.rows("attacks")
    measured = measured[measured["metric"] == "robust_accuracy"]
    return _table("attacks_median_eps", "Median smallest eps", "median smallest eps", results, measured, rows, caption)


def _median_text(results: Results, label: str, attack: str, norm: str) -> str | None:
    levels = sorted({float(eps) for eps in attack_rows(results, attack, norm)["eps"]})
    texts = [column_name("robust_accuracy", {"attack": attack, "norm": norm, "eps": eps}) for eps in levels]
    found = [results.estimate(label, "attacks", "robust_accuracy", text) for text in texts]
    known = [(eps, e) for eps, e in zip(levels, found, strict=True) if e is not None]
    columns = aligned([e for _, e in known]) if known else None
    if columns is None or known[0][0] != 0 or len(known) < 2:
        return None
    _, stands = columns  # (N, 1 + E)
    right = stands[stands[:, 0] > 0]
    steps = np.array([*(eps for eps, _ in known[1:]), math.inf])
    smallest = steps[right[:, 1:].astype(bool).cumprod(1).sum(1)]  # as many eps as it withstood before one broke it
    largest = known[-1][0]

    def shown(eps: float) -> str:
        return eps_text(eps, norm) if math.isfinite(eps) else f"> {eps_text(largest, norm)}"

    median, low, high = median_interval(smallest)
    if math.isnan(median):
        return None
    return f"{shown(median)} [{shown(low)}, {shown(high)}]" if math.isfinite(low) else shown(median)


def by_strength(results: Results) -> Table | None:
    """Accuracy without and under PGD with the probe's strength one step below and above the chosen one."""
    rows = results.rows("attacks")
    rows = rows[rows["metric"] == "robust_accuracy_by_strength"]
    lines = list(_lines(results, "attacks", rows, ("attack", "norm"), _family, ("strength", "norm", "eps"), _strength))
    caption = "On some of the attacked images. Where a step of the strength moves a number, the number is the probe's."
    return _table(
        "attacks_strength", "Sensitivity to the probe's strength", "accuracy %", results, rows, lines, caption
    )


def moved(results: Results) -> Table | None:
    """How far the representation was moved, and its cosine with the clean one."""
    rows = results.rows("attacks")
    rows = rows[rows["metric"].isin(["moved", "cosine"])]

    def group(metric: str, norm: str) -> str:
        what = "distance moved, share of its length" if metric == "moved" else "cosine with the clean one"
        return f"{what}, {norm_name(norm)}"

    lines = list(_lines(results, "attacks", rows, ("metric", "norm"), group, ("norm", "eps"), _eps, "plain"))
    title = "Representation under attack"
    return _table("attacks_representation", title, "mean over images", results, rows, lines, "PGD along the distance.")


def damage(results: Results) -> Table | None:
    """The share kept and the signal-to-noise ratio at the middle level of each kind of damage, by site."""
    rows = results.rows("internal")
    lines: list[Row] = []
    units: dict[str, Unit] = {"accuracy": "percent", "snr_db": "plain"}
    for metric, unit in units.items():
        mine = rows[rows["metric"] == metric]
        for kind in sorted(set(mine["kind"])):
            at = mine[mine["kind"] == kind]
            levels = sorted(set(at["level"]) - {0.0})
            if not levels:
                continue
            level = levels[len(levels) // 2]
            what = "kept, %" if metric == "accuracy" else "signal-to-noise ratio, dB"
            for site in sorted(set(at["site"]), key=site_order):
                here = at[at["site"] == site]
                of = mean_of(results, "internal", here[here["level"] == level])
                if metric == "accuracy":
                    of = kept_of(results, of, mean_of(results, "internal", here[here["level"] == 0]))
                lines.append(_row(str(site), of, results, unit, f"{kind} at level {level:g}: {what}"))
    caption = (
        f"Kept: {KEPT}. Signal-to-noise: variance of the clean global representation over "
        "the mean squared change. Means over the masks' seeds; all levels are in measurements.csv."
    )
    return _table("internal_levels", "Damage by site", "at the middle level", results, rows, lines, caption)


def _lines(
    results: Results,
    task: str,
    rows: pd.DataFrame,
    outer: tuple[str, ...],
    group: Callable[..., str],
    inner: tuple[str, ...],
    name: Callable[..., str],
    unit: Unit = "percent",
) -> Iterator[Row]:
    """A row for each value of the columns ``inner``, grouped by those of ``outer``, in the order they come."""
    for heading, part in rows.groupby([rows[column] for column in outer], sort=False):
        for values, cell in part.groupby([part[column] for column in inner], sort=False):
            yield _row(name(*values), mean_of(results, task, cell), results, unit, group(*heading))


def _row(name: str, of: Callable[[str], Estimate | None], results: Results, unit: Unit, group: str) -> Row:
    found = [of(label) for label in results.labels]
    entries = [None if e is None else Number(e.value, e.low, e.high, unit) for e in found]
    return Row(name, entries, group)


def _table(
    name: str, title: str, corner: str, results: Results, measured: pd.DataFrame, rows: Sequence[Row], caption: str
) -> Table | None:
    """The table with the n of the measurements behind it in its corner; None where it has no row."""
    n = results.n_text(measured["n"], name.split("_")[0])
    return Table(name, title, f"{corner}, {n}", results.labels, rows, caption) if rows else None


def _family(attack: str, norm: str) -> str:
    return f"{attack_name(attack)}, {norm_name(norm)}"


def _strength(strength: str, norm: str, eps: float) -> str:
    return f"strength {strength}, {f'eps {eps_text(eps, norm)}' if eps else 'clean'}"


def _eps(norm: str, eps: float) -> str:
    return f"eps {eps_text(eps, norm)}"
