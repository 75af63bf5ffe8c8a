"""How much a frozen global representation knows of the classes: linear probe, few-label probes, kNN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.probes import few_label_probe, fitted_probe, knn, scores
from coss_eval.probes.features import Features
from coss_eval.probes.sgd import SgdProtocol, sgd_probe
from coss_eval.statistics import contrast, mean_interval, mean_of_classes, wilson
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.probe import ProbeOptions
from coss_eval.tasks.task import Result, SplitName, Subject, Task

_FIELDS = {"lr": "lrs", "sgd_batch": "batch_size"}  # of SgdProtocol, by the option's name


@dataclass(frozen=True)
class Probe(ProbeOptions, Task):
    """Two protocols, whose numbers never share a name; see ProbeOptions. Features are extracted in one pass, cached."""

    name: ClassVar[str] = "probe"
    uses_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.sgd  # refuses what no protocol can be

    @cached_property
    def sgd(self) -> SgdProtocol:
        """The protocol of "sgd": what is not given is the field's."""
        given = self.of_sgd()
        if given.pop("bf16", False):
            given["precision"] = "bf16"
        return SgdProtocol(**{_FIELDS.get(name, name): value for name, value in given.items()})

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        train = {"train": _training_split(subject).fingerprint}
        if self.protocol == "sgd":
            params = {"method": "sgd", **self.sgd.params(), "seed": seed, **train}
            # 1 drew the crops of pretraining; 2 did not widen a grid of learning rates
            return [Cell(self.name, params, algorithm_version=3 if len(self.sgd.lrs) > 1 else 2)]
        few = {"method": "linear", **train}
        return [
            Cell(self.name, {"method": "linear", **train}),
            *(
                # 1 drew one label set
                Cell(self.name, {**few, "labels": fraction, "draws": self.draws, "seed": seed}, algorithm_version=2)
                for fraction in self.fractions
            ),
            Cell(self.name, {"method": "knn", "k": self.k, "temperature": self.temperature, **train}),
        ]

    def impossible(self, subject: Subject) -> str | None:
        no_train = f"{subject.data.name} has no training split, which probes are fitted on"
        return no_train if subject.data.train is None else None

    def forwards(self, cell: Cell, subject: Subject) -> float:
        """One pass over the features, shared by the cells, and fits that cost about as much again; or every epoch."""
        train, test = len(_training_split(subject)), len(subject.data.test)
        if cell.params["method"] == "sgd":
            return float(self.sgd.epochs * train + test)
        fits = 2 + self.draws * len(self.fractions)
        return 2 * (train + test) * (self.draws if "labels" in cell.params else 1) / fits

    def reads(self, subject: Subject) -> list[SplitName]:
        return ["test"] if self.protocol == "sgd" else ["train", "test"]

    def measure(self, cell: Cell, subject: Subject) -> Result:
        params, train = cell.params, _training_split(subject)
        test = subject.features(subject.data.test)
        if params["method"] == "sgd":
            head = sgd_probe(subject.model, train, self.sgd, subject.compute, seed=params["seed"])
            return _scored(head.module()(test.values["global"]).detach(), test, cell, *head.notes())
        if params["method"] == "knn":
            logits, how = self._votes(cell, subject, subject.features(train), test)
        elif "labels" in params:
            return self._few_labels(cell, subject, test)
        else:
            probe = fitted_probe(subject.model, train, subject.compute)
            logits, how = probe.module()(test.values["global"]), probe.describe()
        return _scored(logits.detach(), test, cell, how)

    def _few_labels(self, cell: Cell, subject: Subject, test: Features) -> Result:
        """Probes on several label sets; a larger share of the labels holds the smaller one's of the same draw."""
        params, train = cell.params, _training_split(subject)
        features = subject.features(train)
        predicted, strengths = [], []
        for draw in range(params["draws"]):
            seed = params["seed"] * params["draws"] + draw  # no set is drawn for two seeds
            probe = few_label_probe(features, train, params["labels"], seed=seed, device=subject.compute.device)
            predicted.append(probe.module()(test.values["global"]).detach())
            strengths.append(f"{probe.strength:.3g}{' (fixed)' if not probe.path else ''}")
        sets = f"{100 * params['labels']:g} % of the labels, {params['draws']} label sets"
        how = f"{sets}: linear probes of strengths {', '.join(strengths)}"
        return _scored_over_draws(predicted, test, {"labels": f"{params['labels']:.3g}"}, how)

    def _votes(self, cell: Cell, subject: Subject, train: Features, test: Features) -> tuple[Tensor, str]:
        k = min(cell.params["k"], len(train))
        votes = knn.predict(
            train.values["global"],
            train.labels,
            test.values["global"],
            num_classes=len(subject.data.classes),
            k=k,
            temperature=cell.params["temperature"],
            device=subject.compute.device,
        )
        return votes, f"kNN, k={k}, temperature {cell.params['temperature']}"


def _training_split(subject: Subject) -> Split:
    if subject.data.train is None:
        raise UsageError(
            f"{subject.data.name} has no training split, which probes are fitted on; leave the task probe out"
        )
    return subject.data.train


def _scored(logits: Tensor, test: Features, cell: Cell, *how: str) -> Result:
    """top1 with its interval and verdicts, top5 and mean per class beside it; others are called knn_... and sgd_..."""
    params = cell.params
    prefix = {"knn": "knn_", "sgd": "sgd_"}.get(params["method"], "")
    condition: dict[str, Any] = {"epochs": params["epochs"]} if "epochs" in params else {}
    correct = (logits.argmax(1) == test.labels).numpy()
    result = Result.of_verdicts(f"{prefix}top1", np.asarray(test.ids), [(condition, correct)])
    n, labels = len(correct), test.labels.numpy()
    of_class = mean_of_classes(np.bincount(labels[correct], minlength=labels.max() + 1), np.bincount(labels))
    for metric, value in scores(logits, test.labels).items():
        if metric != "top1":
            bounds = wilson(value * n, n) if metric == "top5" else of_class
            result.measurements.append(Measurement(prefix + metric, value, n, *bounds, condition))
    result.notes.extend(how)
    return result


def _scored_over_draws(logits: list[Tensor], test: Features, condition: dict[str, Any], how: str) -> Result:
    """top1, top5 and mean per class, means over label sets with intervals about new label sets and new images.

    Each set's top1 and its verdicts stand beside them, under the condition ``draw``.
    """
    labels = test.labels.numpy()
    count = np.bincount(labels)
    weight = len(labels) / (np.count_nonzero(count) * count[labels])  # of an image in the mean per class
    right = np.stack([(one.argmax(1) == test.labels).numpy() for one in logits])  # (D, N)
    ranked = np.stack(
        [(one.topk(min(5, one.shape[1])).indices == test.labels[:, None]).any(1).numpy() for one in logits]
    )
    draws = [({**condition, "draw": draw}, verdicts) for draw, verdicts in enumerate(right)]
    result = Result.of_verdicts("top1", np.asarray(test.ids), draws)
    values = {"top1": right.astype(float), "top5": ranked.astype(float), "mean_per_class": right * weight}
    for metric, found in values.items():
        result.measurements.append(Measurement(metric, float(found.mean()), len(labels), *_bounds(found), condition))
    result.notes.append(how)
    return result


def _bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of (D, N) about new draws and images, or about images where there is one draw."""
    found = contrast([(1.0, values)]) if len(values) > 1 else mean_interval(values[0])
    return max(0.0, found.low), min(1.0, found.high)
