"""The headline: one row a checkpoint, one column a kind of robustness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from coss_eval.corruptions.names import BENCHMARK, SEVERITIES
from coss_eval.reports.results import Estimate, Results, kept, mean
from coss_eval.reports.scores import (
    KEPT,
    Score,
    attack_families,
    attack_rows,
    corrupted,
    eps_text,
    explained,
    kept_area,
    mean_of,
    site_order,
)
from coss_eval.store import column_name

CROP = 0.2  # of the image's area: the smallest training crops of most recipes lie below it

Columns = dict[str, Callable[[Results, str], Estimate | None]]


def columns(results: Results) -> list[Score]:
    """The headline's columns, without those that no checkpoint has or that repeat the one before."""
    percent: Columns = {
        "clean top-1": clean,
        "linear probe": partial(probe, metric="top1"),
        **{f"SGD linear probe, {epochs} epochs": partial(sgd_probe, epochs=epochs) for epochs in sgd_epochs(results)},
        "kNN": partial(probe, metric="knn_top1"),
        "corrupted": benchmark,
        "kept": corrupted_kept,
        **{f"PGD {eps_text(eps)}": partial(pgd, eps=eps) for eps in chosen_eps(results)},
        "kept, channels masked": partial(masked, kind="channel"),
        "kept, locations masked": partial(masked, kind="location"),
        f"kept, {100 * CROP:g} % crop": cropped,
    }
    plain: Columns = {
        f"{name}{end}": partial(normalised_redundancy, state=state, metric=metric)
        for name, metric in _redundancies(results).items()
        for end, state in (("", "trained"), (", untrained", "untrained"))
    }
    scores = [Score(name, partial(of, results)) for name, of in percent.items()]
    scores += [Score(name, partial(of, results), "plain") for name, of in plain.items()]
    values = {s.name: [e.value if e else None for e in map(s.of, results.labels)] for s in scores}
    if values["linear probe"] == values["clean top-1"]:  # the classifier IS the probe, or nothing but probes was run
        values.pop("linear probe" if any(map(results.heads, results.labels)) else "clean top-1")
    return [s for s in scores if any(value is not None for value in values.get(s.name, []))]


def _redundancies(results: Results) -> dict[str, str]:
    """Metrics by column: centred per grid position; of results from before that was measured, with a single mean."""
    found = set(results.rows("redundancy")["metric"])
    named = {"redundancy": "normalised_per_position", "redundancy, interior": "normalised_interior"}
    known = {name: metric for name, metric in named.items() if metric in found}
    return known or {"redundancy, one mean": "normalised"}


TERMS = {
    "clean top-1": "of the classifier named under head",
    "linear probe": "logistic regression on the images as they are",
    "SGD linear probe": "trained on random crops and flips",
    "corrupted": "mean over the benchmark's 15 corruptions and 5 severities",
    "kept": KEPT,
    "PGD": "robust accuracy, Linf",
    "masked": "area under accuracy over the share masked before pooling",
    "crop": "in the centre, by area",
    "redundancy": "how alike an image's locations are: (within - between)/(1 - between) cosine, 0 as of two images; "
    "the mean of each grid position is taken off first, unless one mean is named",
    "redundancy, interior": "without the border of the grid, where zero padding makes locations alike",
    "redundancy, one mean": "as measured before positions were centred: zero padding moves it",
}


def caption(scores: Sequence[Score]) -> str:
    """What the words in these columns' names mean."""
    return explained(TERMS, (score.name for score in scores))


def clean(results: Results, label: str) -> Estimate | None:
    """Clean top-1 of the classifier that the robustness tasks use."""
    found = corrupted(results, label, "clean", 0)
    return found if found is not None else probe(results, label, "top1")


def probe(results: Results, label: str, metric: str) -> Estimate | None:
    """An unconditional measurement of the probe task."""
    return results.estimate(label, "probe", metric, metric)


def sgd_epochs(results: Results) -> list[int]:
    """How long the SGD linear probes of these results were trained: one column each."""
    rows = results.rows("probe")
    found = rows.loc[rows["metric"] == "sgd_top1", "epochs"] if "epochs" in rows else ()
    return sorted({int(epochs) for epochs in found})


def sgd_probe(results: Results, label: str, epochs: int) -> Estimate | None:
    """Top-1 of the linear probe trained on random crops and flips."""
    return results.estimate(label, "probe", "sgd_top1", column_name("sgd_top1", {"epochs": epochs}))


def benchmark(results: Results, label: str) -> Estimate | None:
    """Mean accuracy over the 15 corruptions and five severities; a gap unless all 75 are there."""
    return mean([corrupted(results, label, name, severity) for name in BENCHMARK for severity in SEVERITIES])


def corrupted_kept(results: Results, label: str) -> Estimate | None:
    """The share of its accuracy above chance that a checkpoint keeps over the benchmark."""
    return kept(benchmark(results, label), corrupted(results, label, "clean", 0), results.chance(label))


def chosen_eps(results: Results) -> list[float]:
    """The two eps shown: 0.5/255 and 2/255 where PGD in Linf has both, else a third and two thirds up its list."""
    if ("pgd", "linf") not in attack_families(results):
        return []
    found = sorted({float(eps) for eps in attack_rows(results, "pgd", "linf")["eps"]} - {0.0})
    wanted = [e for e in found if np.isclose(e * 255, [0.5, 2]).any()]
    last = len(found) - 1
    return wanted if len(wanted) == 2 else [found[i] for i in sorted({last // 3, 2 * last // 3})] if found else []


def pgd(results: Results, label: str, eps: float) -> Estimate | None:
    """Robust accuracy under PGD in Linf."""
    rows = attack_rows(results, "pgd", "linf")
    return mean_of(results, "attacks", rows[rows["eps"] == eps])(label)


def masked(results: Results, label: str, kind: str) -> Estimate | None:
    """The share kept under masking: of the area over the levels, before pooling or at the last site."""
    rows = results.rows("internal")
    if rows.empty:
        return None
    rows = rows[(rows["metric"] == "accuracy") & (rows["kind"] == kind)]
    sites = sorted(set(rows["site"]), key=site_order)
    site = "prepool" if "prepool" in sites else next(reversed(sites), None)
    return kept_area(results, rows[rows["site"] == site])(label)


def cropped(results: Results, label: str) -> Estimate | None:
    """The share of the full images' accuracy above chance kept on centre crops of CROP of their area."""
    part, whole = (
        results.estimate(label, "crops", "accuracy", column_name("accuracy", {"family": "area", "area": area}))
        for area in (CROP, 1.0)
    )
    return kept(part, whole, results.chance(label))


def normalised_redundancy(results: Results, label: str, state: str, metric: str) -> Estimate | None:
    """Normalised redundancy of the trained or untrained network, in one of its centrings."""
    rows = results.rows("redundancy")
    rows = rows[rows["metric"] == metric]
    if "weights" in rows:
        rows = rows[rows["weights"].fillna("trained") == state]
    return mean_of(results, "redundancy", rows)(label) if len(rows) else None
