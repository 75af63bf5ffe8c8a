"""Which weights, data, protocol and versions the numbers of a report belong to, and what a reader must know first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from coss_eval.reports.layout import Row, Table
from coss_eval.reports.results import Results
from coss_eval.store import Record

STATISTICS = (
    "Brackets are 95 % intervals over images: Wilson's for a proportion, Wilson's with the images as clusters for a "
    "mean or an area over conditions of the same images, Student's on the images' shares for ratios, a jackknife for "
    "redundancy. Differences are paired over the same images (Newcombe's interval and McNemar's mid-p for one "
    "condition, Student's t on the images' means for several, no surer than the sign test where all images go one "
    "way); where only intervals are stored, theirs is as wide as of other images (Zou and Donner 2008), without p. "
    "These compare checkpoints. Methods of several seeds have intervals and differences about new seeds and new "
    "images: readers nested in methods (Obuchowski and Rockette 1995) with Satterthwaite's degrees of freedom. p is "
    "adjusted over its table (Holm): every pair in the run on every score of the table, whatever is shown of it. Each "
    "table is an exploratory family of its own; only claims that were written down beforehand (coss-eval claim) are "
    "more."
)


WORDS = {  # a cell's parameters as a reader says them; others by their names, without underscores
    "attack": "attack {}",
    "augmentation": "trained on {}",
    "backend": "{} backend",
    "batch_size": "{} images a step",
    "checked_images": "masked gradients looked for on {} images",
    "crop_area": "crops of {} of the area",
    "epochs": "{} epochs",
    "family": "family {}",
    "flavour": "corruptions as in {}",
    "flip": "flipped with probability {}",
    "held_out": "{} of the training images held out to choose by",
    "images": "{} images attacked",
    "k": "{} neighbours",
    "labels": "{} of the labels",
    "loss": "{} loss",
    "lr_for_batch": "learning rates for a batch of {}",
    "match_locations": "{} locations kept at every site",
    "method": "method {}",
    "order_seed": "images in the order of seed {}",
    "precision": "precision {}",
    "rescale": "what is left scaled up: {}",
    "restarts": "random starts {}",
    "second_loss": "second loss {}",
    "source": "images from {}",
    "step_size": "steps of {}",
    "steps": "{} steps",
    "table": "severities as for {}",
    "temperature": "votes at temperature {}",
    "train": "fingerprint of the training images {}",
}
SPELT = {"True": "yes", "False": "no", "ce": "cross-entropy", "knn": "kNN", "sgd": "SGD"}


def protocol_line(results: Results, task: str) -> str:
    """The parameters that all cells of a task share, and those few that vary, in plain words; empty without any."""
    cells = results.cells(task)
    named = {name for cell in cells for m in cell["measurements"] for name in m["condition"]} - {"seed"}
    values: dict[str, set[str]] = {}
    for cell in cells:
        for name, value in cell["params"].items():
            if name not in named and value is not None and not isinstance(value, list | dict):
                values.setdefault(name, set()).add(SPELT.get(str(value), str(value)))
    texts = [
        WORDS.get(name, f"{name.replace('_', ' ')} {{}}").replace("{}", " or ".join(sorted(value)))
        for name, value in values.items()
        if len(value) <= 3
    ]
    return f"Protocol: {', '.join(texts)}." if texts else ""


def tables(results: Results) -> list[Table]:
    """Checkpoints, data and runs."""
    return [_models(results), _data(results), *runs_table(results.runs)]


def warnings(results: Results) -> list[str]:
    """What a reader must know first."""
    found = [warning for run in results.runs for warning in run.get("warnings", [])] + results.warnings
    found += [
        f"Images were left out (--skip-bad-images): {line}" for run in results.runs for line in run.get("left_out", [])
    ]
    limits = sorted({int(limit) for limit in results.frame["limit"].dropna()})
    if limits:
        shown = ", ".join(map(str, limits))
        found.insert(0, f"LIMITED: some or all numbers are from a subset of the test split (limit {shown}).")
    if {"digits", "scattered-digits"} & set(results.frame["data"]):
        found.insert(0, "A demonstration: scikit-learn's digits support no ranking of methods.")
    devices = sorted({str(run["device"]).split(":")[0] for run in results.runs if run.get("device")})
    if len(devices) > 1:
        found.append(
            f"Runs used several device types ({', '.join(devices)}): perturbations are equal within a type only."
        )
    found += results.groups.warnings
    found += [f"Checkpoints were not measured alike, and may differ by that alone: {line}." for line in results.unlike]
    absent = results.pending
    if absent:
        counts = Counter(f"{cell['model']}: {cell['task']}" for cell in absent)
        shown = ", ".join(f"{name} ({count})" for name, count in counts.items())
        found.append(f"{len(absent)} planned cells are missing: {shown}. The same command goes on with them.")
    return list(dict.fromkeys(found))


def _models(results: Results) -> Table:
    entries = {m["name"]: m for run in results.runs for m in run.get("models", [])}
    rows = []
    for model, label in dict(zip(results.frame["model"], results.frame["checkpoint"], strict=True)).items():
        cell = next(r for r in results.records if r["model"] == model)
        known = {**cell["protocol"].get("model", {}), **entries.get(model, {})}
        preprocessing = known.get("preprocessing") or {}
        numbers = {name: preprocessing[name] for name in ("mean", "std") if name in preprocessing}
        shown = "; ".join(f"{name} {', '.join(f'{v:.4g}' for v in value)}" for name, value in numbers.items())
        source = known.get("normalisation_source")
        rows.append(
            Row(
                model,
                [
                    str(known.get("arch", "")),
                    str(known["sha256"])[:16] if "sha256" in known else "",
                    str(known.get("layout", "")),
                    "; ".join(results.heads(label)),
                    f"{shown} ({source})" if source else shown,
                ],
            )
        )
    columns = ["architecture", "weights (sha256)", "layout", "head", "normalisation"]
    return Table("models", "Checkpoints", "model", columns, rows)


def _data(results: Results) -> Table:
    rows, columns = {}, ["split", "limit", "fingerprint", "geometry"]
    for record in results.records:
        data, geometry = record["protocol"].get("data", {}), record["protocol"].get("geometry") or {}
        shown = ", ".join(f"{name} {_plain(value)}" for name, value in geometry.items())
        limit = data.get("limit")
        entries = [
            str(data.get("split", "")),
            "none" if limit is None else str(limit),
            str(data.get("fingerprint", "")),
            shown,
        ]
        rows[str(entries)] = Row(str(data.get("name", "?")), entries)
    return Table("data", "Data", "dataset", columns, list(rows.values()))


def runs_table(runs: Sequence[Record]) -> list[Table]:
    """What the entries of a run.json were made with; none where there is none."""
    if not runs:
        return []
    rows = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
        device = " ".join(str(run[name]) for name in ("device", "device_name") if run.get(name))
        threads = f", {count} thread{'s' * (count > 1)}" if (count := int(run.get("threads") or 0)) else ""
        commit = str(run.get("git_commit") or "")
        rows.append(
            Row(
                str(run.get("started", "?")),
                [f"`{run['command']}`" if run.get("command") else "", f"{device}{threads}",
                 "" if run.get("seed") is None else str(run["seed"]), versions,
                 commit[:12] + ("+" if commit.endswith("+") else "")],
            )
        )  # fmt: skip
    return [Table("runs", "Runs", "started", ["command", "device", "seed", "versions", "commit"], rows)]


def _plain(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)
