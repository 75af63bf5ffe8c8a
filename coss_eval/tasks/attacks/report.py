"""What a report shows of the attacks: robust accuracy by eps, the smallest eps that breaks an image, the checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from coss_eval.reports.drawing import WHOLE, Canvas, chance_in, legend, line, looks_in, panels, percent
from coss_eval.reports.estimates import aligned
from coss_eval.reports.layout import Row, Table
from coss_eval.reports.results import Results
from coss_eval.reports.scores import (
    Column,
    Of,
    Score,
    TaskScores,
    further_table,
    mean_of,
    plain_scores,
    score_row,
)
from coss_eval.reports.task_report import TaskReport
from coss_eval.statistics import median_interval

TASK = "attacks"
SWEPT_VERSION = 1  # of an attack's cells; those of the attacks of one step have been run at each eps alone since then
DETAILS = ("robust_accuracy_by_strength", "moved", "cosine")  # have tables of their own


def scores(results: Results) -> list[TaskScores]:
    """One row an attack, norm and eps; what else the task measured below them."""
    rows = []
    for attack, norm in families(results):
        for eps in levels(results, attack, norm):
            name = f"eps {eps_text(eps, norm)}" if eps else "clean, same images"
            rows.append(Score(name, robust(results, attack, norm, eps), group=family_name(attack, norm)))
    rest = [(metric, c) for metric, c in results.found(TASK) if metric not in ("robust_accuracy", *DETAILS)]
    rows += plain_scores(results, TASK, rest)
    caption = (
        f"Robust accuracy counts an image as right only if it is right without and under the attack. {sweeps(results)}"
    )
    return [TaskScores(TASK, "Attacks", "robust accuracy %", rows, caption)]


def families(results: Results) -> list[tuple[str, str]]:
    """The pairs of attack and norm, PGD first."""
    pairs = {(str(c["attack"]), str(c["norm"])) for c in results.conditions(TASK, "robust_accuracy")}
    return sorted(pairs, key=lambda pair: (pair[0] != "pgd", pair[0], pair[1] != "linf", pair[1]))


def levels(results: Results, attack: str, norm: str) -> list[float]:
    """The eps of one attack in one norm, rising from the clean 0."""
    found = results.conditions(TASK, "robust_accuracy", attack=attack, norm=norm)
    return sorted({float(condition["eps"]) for condition in found})


def robust(results: Results, attack: str, norm: str, eps: float) -> Of:
    """Robust accuracy under one attack at one eps."""
    found = results.conditions(TASK, "robust_accuracy", attack=attack, norm=norm, eps=eps)
    return mean_of(results, TASK, "robust_accuracy", found)


def sweeps(results: Results) -> str:
    """Which attacks are swept over eps, and what that makes of a number at one eps."""
    cells = [record for record in results.cells(TASK) if "attack" in record["params"]]
    swept, alone = (
        sorted({attack_name(record["params"]["attack"]) for record in cells if _is_swept(record) == wanted})
        for wanted in (True, False)
    )
    texts = []
    if swept:
        names = ", ".join(swept)
        texts.append(f"{names}: smallest over this list of eps: an image broken at a smaller eps counts as broken.")
    if alone:
        texts.append(f"{', '.join(alone)}: one step, run at each eps alone, so that the curve may rise again.")
    return " ".join(texts)


def _is_swept(record: Mapping[str, Any]) -> bool:
    return bool(record.get("algorithm_version", 1) == SWEPT_VERSION)


def attack_name(attack: str) -> str:
    """An attack for reading: "PGD", "Square", "the representation, kNN", "foolbox's LinfDeepFoolAttack"."""
    name, _, part = attack.partition(":")
    if name == "representation":
        return "Representation attacked" + {"knn": ", kNN", "probe": ", linear probe"}.get(part, "")
    if part:  # "package.module:Class" is a person's own
        return f"foolbox's {part}" if name == "foolbox" else part
    return "Square" if name == "square" else name.upper()


def family_name(attack: str, norm: str) -> str:
    return f"{attack_name(attack)}, {norm_name(norm)}"


def eps_text(eps: float, norm: str = "linf") -> str:
    """An Linf eps in 255ths ("1/255", "0.25/255"), others as a fraction where they are one."""
    if norm == "linf":
        return f"{eps * 255:.4g}/255"
    fraction = Fraction(eps).limit_denominator(128)
    return str(fraction) if abs(float(fraction) - eps) < 1e-9 else f"{eps:.4g}"


def norm_name(norm: str) -> str:
    return {"linf": "Linf", "l2": "L2"}.get(norm, norm)


def median_eps(results: Results) -> Table | None:
    """The median smallest eps that breaks an image, one row an attack; "> 8/255" where more than half stand at it."""
    rows = [
        Row(family_name(*family), [_median_texts(results, label, *family) for label in results.labels])
        for family in families(results)
    ]
    rows = [row for row in rows if any(row.entries)]
    caption = (
        "Over the images that are right without the attack: the smallest eps of the list that breaks an image, its "
        "median and 95 % interval by ranks; >: more than half stand at the largest."
    )
    return further_table(
        results,
        TASK,
        ["robust_accuracy"],
        rows,
        name="attacks_median_eps",
        title="Median smallest eps",
        corner="median smallest eps",
        caption=caption,
    )


def _median_texts(results: Results, label: str, attack: str, norm: str) -> str | None:
    """The median of a checkpoint, or those of a method's runs."""
    found = [_median_text(results, member, attack, norm) for member in results.members(label)]
    return None if None in found else "; ".join(text for text in found if text is not None)


def _median_text(results: Results, label: str, attack: str, norm: str) -> str | None:
    found = [(eps, robust(results, attack, norm, eps)(label)) for eps in levels(results, attack, norm)]
    known = [(eps, e) for eps, e in found if e is not None]
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
    metric = "robust_accuracy_by_strength"
    conditions = results.conditions(TASK, metric)
    rows = []
    for attack, norm in dict.fromkeys((c["attack"], c["norm"]) for c in conditions):
        for condition in results.conditions(TASK, metric, attack=attack, norm=norm):
            at = f"eps {eps_text(condition['eps'], norm)}" if condition["eps"] else "clean"
            of = mean_of(results, TASK, metric, [condition])
            score = Score(f"strength {condition['strength']}, {at}", of, group=family_name(attack, norm))
            rows.append(score_row(results, score))
    return further_table(
        results,
        TASK,
        [metric],
        rows,
        name="attacks_strength",
        title="Sensitivity to the probe's strength",
        corner="accuracy %",
        caption="On some of the attacked images. "
        "Where a step of the strength moves a number, the number is the probe's.",
    )


def moved(results: Results) -> Table | None:
    """How far the representation was moved, and its cosine with the clean one."""
    what = {"moved": "distance moved, share of its length", "cosine": "cosine with the clean one"}
    found = [(metric, condition) for metric, condition in results.found(TASK) if metric in what]
    rows = []
    for metric, norm in dict.fromkeys((metric, condition["norm"]) for metric, condition in found):
        for condition in results.conditions(TASK, metric, norm=norm):
            of = mean_of(results, TASK, metric, [condition])
            score = Score(f"eps {eps_text(condition['eps'], norm)}", of, "plain", f"{what[metric]}, {norm_name(norm)}")
            rows.append(score_row(results, score))
    return further_table(
        results,
        TASK,
        list(what),
        rows,
        name="attacks_representation",
        title="Representation under attack",
        corner="mean over images",
        caption="PGD along the distance.",
    )


def by_eps(results: Results, canvas: Canvas = WHOLE) -> Figure | None:
    """A panel an attack and norm; eps on a logarithmic axis, with the clean accuracy at its left."""
    shown = families(results)
    look = looks_in(results, TASK, canvas)
    if not shown or not look:
        return None
    figure, axes = panels(len(shown), width=canvas.inches(), height=1.9, least=1.9, most=3)
    for axis, (attack, norm) in zip(axes, shown, strict=True):
        eps = [e for e in levels(results, attack, norm) if e]
        at = np.log2(eps) if eps else np.zeros(0)
        x = [at[0] - 1.5, *at] if len(at) else [0.0]
        axis.set_title(family_name(attack, norm))
        for label in look:
            points = [robust(results, attack, norm, e)(label) for e in (0.0, *eps)]
            line(axis, x[1:], points[1:], look[label])
            line(axis, x[:1], points[:1], look[label])
            line(axis, x[:2], points[:2], look[label]._replace(marker="", dashes=":"))  # the axis has no scale here
        axis.set_xticks(x, ["0", *(eps_text(e, norm).removesuffix("/255") for e in eps)])
        axis.set_xlabel("eps, in 255ths" if norm == "linf" else "eps")
    percent(axes, chance_in(results, look))
    figure.supylabel("robust accuracy, %", fontsize="medium")
    legend(figure, look)
    return figure


def headline(results: Results) -> list[Column]:
    """Robust accuracy under PGD in Linf at two eps."""
    return [
        Column(f"PGD {eps_text(eps)}", robust(results, "pgd", "linf", eps), terms={"PGD": "robust accuracy, Linf"})
        for eps in chosen_eps(results)
    ]


def chosen_eps(results: Results) -> list[float]:
    """The two eps shown: 0.5/255 and 2/255 where PGD in Linf has both, else a third and two thirds up its list."""
    found = [eps for eps in levels(results, "pgd", "linf") if eps]
    wanted = [e for e in found if np.isclose(e * 255, [0.5, 2]).any()]
    last = len(found) - 1
    return wanted if len(wanted) == 2 else [found[i] for i in sorted({last // 3, 2 * last // 3})] if found else []


REPORT = TaskReport(
    scores=scores,
    tables=(median_eps, by_strength, moved),
    figures={
        "attacks_by_eps": (
            by_eps,
            "Robust accuracy by eps; at 0 the clean accuracy on the same images, joined by dots. Attacks of many steps "
            "are swept: an image broken at a smaller eps counts as broken. Bands: 95 % (Wilson).",
        )
    },
    headline=headline,
)
