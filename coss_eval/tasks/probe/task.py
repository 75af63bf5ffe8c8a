"""How much a frozen global representation knows of the classes: linear probe, few-label probes, kNN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.probes import few_label_probe, fitted_probe, knn, scores
from coss_eval.probes.features import Features
from coss_eval.probes.sgd import SgdProtocol, sgd_probe
from coss_eval.statistics import mean_of_classes, wilson
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.probe import ProbeOptions
from coss_eval.tasks.task import Result, Subject, Task

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
        return [
            Cell(self.name, {"method": "linear", **train}),
            *(
                Cell(self.name, {"method": "linear", "labels": fraction, "seed": seed, **train})
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
        return 2 * (train + test) / (2 + len(self.fractions))

    def measure(self, cell: Cell, subject: Subject) -> Result:
        params, train, device = cell.params, _training_split(subject), subject.compute.device
        test = subject.features(subject.data.test)
        if params["method"] == "sgd":
            head = sgd_probe(subject.model, train, self.sgd, subject.compute, seed=params["seed"])
            return _scored(head.module()(test.values["global"]).detach(), test, cell, *head.notes())
        if params["method"] == "knn":
            logits, how = self._votes(cell, subject, subject.features(train), test)
        elif "labels" in params:
            features = subject.features(train)
            probe = few_label_probe(features, train, params["labels"], seed=params["seed"], device=device)
            logits = probe.module()(test.values["global"])
            how = f"{100 * params['labels']:g} % of the labels: {probe.describe()}"
        else:
            probe = fitted_probe(subject.model, train, subject.compute)
            logits, how = probe.module()(test.values["global"]), probe.describe()
        return _scored(logits.detach(), test, cell, how)

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
    condition: dict[str, Any] = {"labels": f"{params['labels']:.3g}"} if "labels" in params else {}
    condition |= {"epochs": params["epochs"]} if "epochs" in params else {}
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
