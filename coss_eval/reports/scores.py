"""What each task's table shows: its rows, as scores that any checkpoint may have or lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import pandas as pd

from coss_eval.reports.results import Estimate, Results, area, kept, mean
from coss_eval.store import column_name

Unit = Literal["percent", "plain"]

METRIC_NAMES = {
    "top1": "linear probe top-1",
    "top5": "linear probe top-5",
    "mean_per_class": "linear probe, mean per class",
    "sgd_top1": "SGD linear probe top-1",
    "sgd_top5": "SGD linear probe top-5",
    "sgd_mean_per_class": "SGD linear probe, mean per class",
    "knn_top1": "kNN top-1",
    "knn_top5": "kNN top-5",
    "knn_mean_per_class": "kNN, mean per class",
    "robust_accuracy": "robust accuracy",
    "relative_accuracy": "kept",
    "r2": "R² of the image mean",
    "icc": "ICC(1)",
    "local_global": "cosine with the global",
    "local_global_leave_one_out": "local-global cosine, leave one out",
    "rankme_global": "RankMe of the global",
    "lidar": "LiDAR",
    "gaussian_mutual_information": "Gaussian mutual information",
    "local_global_cka": "local-global CKA",
    "stability": "cosine with the full image",
}


KEPT = (
    "(accuracy - chance)/(clean accuracy - chance), chance = 1/classes; none where the clean accuracy is within 3 "
    "standard errors of chance, or results from older versions do not tell the number of classes"
)


@dataclass(frozen=True)
class Score:
    """One row of a table: what it is called and its estimate for a checkpoint (None: a gap), computed once."""

    name: str
    of: Callable[[str], Estimate | None]
    unit: Unit = "percent"
    group: str = ""
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", cache(self.of))


@dataclass(frozen=True)
class TaskScores:
    """The rows of one table of a task, and what the numbers in it are."""

    task: str
    title: str
    quantity: str  # heads the table: "accuracy %"
    scores: list[Score]
    caption: str = ""
    name: str = ""  # the table's; the task's own where it is the task's main table

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.task)


def listed(results: Results, task: str) -> TaskScores:
    """One row for each metric and condition; seeds of one condition are averaged over."""
    scores = _plain_rows(results, task, results.rows(task))
    title = {"probe": "Probes"}.get(task, task.capitalize())
    return TaskScores(task, title, "value" if any(s.unit == "plain" for s in scores) else "accuracy %", scores)


def _plain_rows(results: Results, task: str, rows: pd.DataFrame) -> list[Score]:
    groups = _grouped(rows, without=("seed",))
    place = {name: i for i, name in enumerate(METRIC_NAMES)}
    groups.sort(key=lambda group: (place.get(group[0][0], len(place)), group[0][1] != ""))  # stable
    return [
        Score(", ".join([metric_name(metric), *condition_texts(text)]), mean_of(results, task, group), _unit(metric))
        for (metric, text), group in groups
    ]


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def explained(terms: Mapping[str, str], names: Iterable[str]) -> str:
    """What the terms mean that some of the names begin or end with: "PGD: robust accuracy, Linf · ..."."""
    names = list(names)
    used = [
        f"{term}: {text}"
        for term, text in terms.items()
        if any(name.startswith(term) or name.endswith(term) for name in names)
    ]
    return " · ".join(used) + "." if used else ""


def condition_texts(text: str) -> list[str]:
    """A condition for reading: "labels=0.01,area=0.2" is "1 % of the labels" and "area 0.2"."""
    parts = (part.partition("=") for part in text.split(",") if part)
    return [
        f"{100 * float(value):g} % of the labels" if name == "labels" else f"{name} {value}" for name, _, value in parts
    ]


def corrupted(results: Results, label: str, name: str, severity: int) -> Estimate | None:
    """Accuracy under one corruption at one severity."""
    condition = column_name("accuracy", {"corruption": name, "severity": severity})
    return results.estimate(label, "corruptions", "accuracy", condition)


def attacks(results: Results) -> TaskScores:
    """One row an attack, norm and eps; what else the task measured below them."""
    scores = []
    for attack, norm in attack_families(results):
        rows = attack_rows(results, attack, norm)
        for eps in sorted(set(rows["eps"])):
            name = f"eps {eps_text(eps, norm)}" if eps else "clean, same images"
            of = mean_of(results, "attacks", rows[rows["eps"] == eps])
            scores.append(Score(name, of, group=f"{attack_name(attack)}, {norm_name(norm)}"))
    rest = results.rows("attacks")
    shown = ("robust_accuracy", *ATTACK_DETAILS)
    scores += _plain_rows(results, "attacks", rest[~rest["metric"].isin(shown)])
    caption = (
        f"Robust accuracy counts an image as right only if it is right without and under the attack. {sweeps(results)}"
    )
    return TaskScores("attacks", "Attacks", "robust accuracy %", scores, caption)


SWEPT_VERSION = 1  # of an attack's cells; those of the attacks of one step have been run at each eps alone since then


def sweeps(results: Results) -> str:
    """Which attacks are swept over eps, and what that makes of a number at one eps."""
    cells = [record for record in results.cells("attacks") if "attack" in record["params"]]
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


ATTACK_DETAILS = ("robust_accuracy_by_strength", "moved", "cosine")  # have tables of their own: details.py


def attack_name(attack: str) -> str:
    """An attack for reading: "PGD", "Square", "the representation, kNN", "foolbox's LinfDeepFoolAttack"."""
    name, _, part = attack.partition(":")
    if name == "representation":
        return "Representation attacked" + {"knn": ", kNN", "probe": ", linear probe"}.get(part, "")
    if part:  # "package.module:Class" is a person's own
        return f"foolbox's {part}" if name == "foolbox" else part
    return "Square" if name == "square" else name.upper()


def attack_families(results: Results) -> list[tuple[str, str]]:
    """The pairs of attack and norm, PGD first."""
    rows = results.rows("attacks")
    rows = rows[rows["metric"] == "robust_accuracy"]
    if rows.empty:
        return []
    pairs = {(str(attack), str(norm)) for attack, norm in zip(rows["attack"], rows["norm"], strict=True)}
    return sorted(pairs, key=lambda pair: (pair[0] != "pgd", pair[0], pair[1] != "linf", pair[1]))


def attack_rows(results: Results, attack: str, norm: str) -> pd.DataFrame:
    """Robust accuracies under one attack in one norm."""
    rows = results.rows("attacks")
    return rows[(rows["metric"] == "robust_accuracy") & (rows["attack"] == attack) & (rows["norm"] == norm)]


def eps_text(eps: float, norm: str = "linf") -> str:
    """An Linf eps in 255ths ("1/255", "0.25/255"), others as a fraction where they are one."""
    if norm == "linf":
        return f"{eps * 255:.4g}/255"
    fraction = Fraction(eps).limit_denominator(128)
    return str(fraction) if abs(float(fraction) - eps) < 1e-9 else f"{eps:.4g}"


def norm_name(norm: str) -> str:
    return {"linf": "Linf", "l2": "L2"}.get(norm, norm)


def internal(results: Results) -> TaskScores:
    """Areas under accuracy over the level of damage, by kind and site; the masks' seeds are averaged over."""
    rows = results.rows("internal")
    places = sorted(
        {(str(kind), str(site)) for kind, site in zip(rows["kind"], rows["site"], strict=True)},
        key=lambda place: (place[0], site_order(place[1])),
    )
    rows = rows[rows["metric"] == "accuracy"]
    makers: dict[str, Callable[..., Callable[[str], Estimate | None]]] = {"accuracy": area_of, "kept": kept_area}
    scores = [
        Score(site, of(results, rows[(rows["kind"] == kind) & (rows["site"] == site)]), group=f"{kind}, {quantity}")
        for quantity, of in makers.items()
        for kind, site in places
    ]
    scores = [score for score in scores if any(score.of(label) for label in results.labels)]
    caption = (
        "Area under the curve over the level: the share masked, or the noise relative to the channels' deviation; the "
        f"mean over the masks' seeds. Kept: {KEPT}."
    )
    return TaskScores("internal", "Corruption inside the network", "area under accuracy %", scores, caption)


CROP_FAMILIES = {  # what varies, and how a table heads its rows
    "area": ("area", "centre crops, share of the image's area"),
    "position": ("position", "position of the crop"),
    "resolution": ("scale", "whole image, share of the input's side"),
    "pooled": ("crops", "number of crops pooled"),
}


def crops(results: Results) -> TaskScores:
    """Accuracy by what varies (area, position, resolution, number of pooled crops), then the stability likewise."""
    scores = []
    metrics: dict[str, Unit] = {"accuracy": "percent", "stability": "plain"}
    for metric, unit in metrics.items():
        for family, (_, heading) in CROP_FAMILIES.items():
            for value, rows in crop_rows(results, family, metric):
                name = f"{value:g}" if isinstance(value, float) else value
                group = f"{metric_name(metric)}: {heading}"
                scores.append(Score(name, mean_of(results, "crops", rows), unit, group))
    caption = (
        "Crops keep the image's shape and are resized to the network's input. Cosine: between the global "
        "representations of the crop and of the full image, the mean over the full images subtracted."
    )
    return TaskScores("crops", "Crops of the test images", "accuracy %, or cosine", scores, caption)


def crop_rows(results: Results, family: str, metric: str) -> list[tuple[float | str, pd.DataFrame]]:
    """The rows of one metric for each value of what varies in a family of crops, in the order of the axis."""
    rows = results.rows("crops")
    if "family" not in rows:
        return []
    rows = rows[(rows["family"] == family) & (rows["metric"] == metric)]
    varied, _ = CROP_FAMILIES[family]
    values = list(dict.fromkeys(rows[varied])) if len(rows) else []
    return [(value, rows[rows[varied] == value]) for value in (values if family == "position" else sorted(values))]


def site_order(site: str) -> tuple[int, int, str]:
    """Sites from the input to the output: stem, stages and blocks by number, before pooling, the global one."""
    late = {"stem": -1, "prepool": 1, "pool": 2, "global": 3}
    digits = "".join(filter(str.isdigit, site))
    return late.get(site, 0), int(digits or 0), site


REDUNDANCY_NOTE = (
    "ReLU, padding and overlapping receptive fields may raise or lower these in any network: read each beside its "
    "untrained row. Zero padding marks each place of the grid in all images alike; rows with one mean taken off take "
    "that for redundancy or against it, rows per position, in the interior and by overlap have the mean of each place "
    "taken off. Below 0, locations of one image are less alike than those of two images."
)
REDUNDANCY_TERMS = {
    "within": "mean cosine of two locations of one image, the data's mean taken off first",
    "between": "of two images, the baseline",
    "normalised": "(within - between)/(1 - between), 1 where the locations of an image are all equal",
    "R² of the image mean": "the share of the locations' variance that it explains, at least 1/L of L locations",
    "ICC(1)": "the same share as an intraclass correlation, without that floor",
    "local-global cosine, leave one out": "a location with the mean of its image's others",
    "cosine with the global": "a location with the network's own global representation",
    "participation ratio": "how many directions carry the variance between image means, within images or in total",
    "effective rank": "the same by the entropy of the singular values",
    "RankMe": "effective rank of the global representations (Garrido et al. 2023)",
    "LiDAR": "effective rank of what tells images apart, relative to the spread within them (Thilak et al. 2024)",
    "Gaussian mutual information": "nats that a location tells of another one of its image if both were Gaussian; "
    "compare at equal n and width",
    "local-global CKA": "linear CKA of the locations with their image's global (Kornblith et al. 2019), 1 where one is "
    "the other up to rotation and scale",
    "within overlapping": "each position's mean taken off, pairs of locations whose receptive fields overlap",
    "within disjoint": "likewise, pairs whose receptive fields do not",
    "position share": "of the variance, what the means of the grid positions make: padding, mostly",
    "pixels covered": "the share of the image's pixels, %, that lie in the receptive field of some location",
    "within at distance": "by steps on the grid between the two locations",
}


SIMILARITIES = ("within", "between", "normalised", "r2", "icc", "local_global_leave_one_out", "local_global")
CENTRINGS = {  # what the ends of their names say, in the order of the table
    "_per_position": "the mean of each grid position taken off",
    "_interior": "the same, without the border of the grid",
    "": "one mean taken off for all positions, so that zero padding counts",
    "rest": "pairs by their receptive fields, variance, ranks, information",
}


def _centring(metric: str) -> str:
    """The entry of CENTRINGS that a metric of redundancy belongs to."""
    found = next((end for end in ("_per_position", "_interior") if metric.endswith(end)), "")
    return found if found or metric in SIMILARITIES else "rest"


def redundancy(results: Results) -> TaskScores:
    """One row a metric, the untrained network's beside it; metrics by distance are in measurements.csv."""
    rows = results.rows("redundancy")
    if "distance" in rows:
        rows = rows[rows["distance"].isna()]
    weights = rows["weights"] if "weights" in rows else pd.Series("trained", index=rows.index)
    scores = []
    for metric in sorted(dict.fromkeys(rows["metric"]), key=lambda each: list(CENTRINGS).index(_centring(each))):
        ending, heading = _centring(metric), CENTRINGS[_centring(metric)]
        for state in ("trained", "untrained"):
            group = rows[(rows["metric"] == metric) & (weights.fillna("trained") == state)]
            if len(group):
                name = metric_name(metric.removesuffix(ending))
                shown = name if state == "trained" else "… untrained network"
                scores.append(Score(shown, mean_of(results, "redundancy", group), _unit(metric), heading))
    caption = f"{REDUNDANCY_NOTE} {explained(REDUNDANCY_TERMS, (score.name for score in scores))}".strip()
    return TaskScores("redundancy", "Redundancy of the local representations", "value", scores, caption)


def _grouped(rows: pd.DataFrame, without: tuple[str, ...]) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Rows by metric and by their condition, except for ``without``; in the order they come."""
    if rows.empty:
        return []
    texts = (
        rows["condition"]
        .where(rows["condition"] != rows["metric"], "")
        .map(lambda text: ",".join(part for part in text.split(",") if part.split("=")[0] not in without))
    )
    groups = rows.groupby([rows["metric"], texts], sort=False)
    return [((str(metric), str(text)), group) for (metric, text), group in groups]


def mean_of(results: Results, task: str, group: pd.DataFrame) -> Callable[[str], Estimate | None]:
    """The mean over the conditions of ``group`` (seeds, mostly), which a checkpoint must all have."""
    wanted = list(dict.fromkeys(zip(group["metric"], group["condition"], strict=True)))
    return lambda label: mean([results.estimate(label, task, metric, text) for metric, text in wanted])


def area_of(results: Results, group: pd.DataFrame) -> Callable[[str], Estimate | None]:
    """The area over levels, each the mean over its seeds."""
    levels = sorted(set(group["level"])) if len(group) else []
    at = [mean_of(results, "internal", group[group["level"] == level]) for level in levels]
    return lambda label: area(levels, [of(label) for of in at])


def kept_area(results: Results, group: pd.DataFrame) -> Callable[[str], Estimate | None]:
    """The share kept of ``area_of``; clean is level 0."""
    return kept_of(results, area_of(results, group), mean_of(results, "internal", group[group["level"] == 0]))


def kept_of(
    results: Results, damaged: Callable[[str], Estimate | None], clean: Callable[[str], Estimate | None]
) -> Callable[[str], Estimate | None]:
    """The share kept, of each checkpoint: see KEPT."""
    return lambda label: kept(damaged(label), clean(label), results.chance(label))


def _unit(metric: str) -> Unit:
    proportions = ("covered", "top1", "top5", "accuracy", "mean_per_class")
    return "percent" if any(name in metric for name in proportions) else "plain"
