"""A small store with every task, written through the store itself: verdicts from a latent skill and difficulty."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np

from coss_eval.corruptions.names import NAMES
from coss_eval.statistics import wilson
from coss_eval.store import Cell, Measurement, Store, column_name

IMAGES = 60
EPS = [0.5 / 255, 1 / 255, 2 / 255]
LEVELS = [0.0, 0.5, 0.9]
CHANCE = 0.1
SITES = ["stage2", "stage10", "prepool"]


class Writer:
    """Writes one checkpoint's cells, task by task."""

    def __init__(
        self,
        store: Store,
        name: str,
        skill: float,
        *,
        limit: int | None = None,
        data: str = "tiny",
        side: int = 64,
        seed: int | None = None,
        images: int = IMAGES,
    ) -> None:
        self.store, self.name, self.skill, self.seed, self.images = store, name, skill, seed, images
        self.ids = np.arange(images) * 7 + 3
        self.protocol: dict[str, Any] = {
            "model": {"sha256": sha256(name.encode()).hexdigest(), "arch": "resnet18"},
            "data": {"name": data, "split": "test", "fingerprint": "f00d", "limit": limit},
            "geometry": {"size": [side, side], "resize": "native"},
            "head": {"head": "probe"},
        }

    def verdicts(self, damage: float, draw: int = 0) -> np.ndarray:
        difficulty = np.random.default_rng(0).normal(size=self.images)
        own = len(self.name) if self.seed is None else 1000 + self.seed  # training seeds have luck of their own
        luck = np.random.default_rng([draw, own]).random(self.images)
        return luck < 1 / (1 + np.exp(2 * (difficulty + damage - self.skill)))

    def write(
        self,
        cell: Cell,
        verdicts: Iterable[tuple[str, dict[str, Any], np.ndarray]],
        further: Iterable[Measurement] = (),
        **more: Any,
    ) -> str:
        found = list(verdicts)
        measurements = [
            Measurement(metric, float(c.mean()), len(c), *wilson(int(c.sum()), len(c)), condition)
            for metric, condition, c in found
        ]
        samples = {"id": self.ids} | {column_name(metric, condition): c for metric, condition, c in found}
        return self.put(cell, [*measurements, *further], samples, **more)

    def put(
        self, cell: Cell, measurements: list[Measurement], samples: Any = None, *, notes: Iterable[str] = ()
    ) -> str:
        protocol, notes = self.protocol, [*notes, "head: linear probe, strength 0.1"]
        if cell.task == "probe":  # which fits its own
            protocol, notes = {k: v for k, v in protocol.items() if k != "head"}, notes[:-1]
        key = self.store.key(protocol, cell)
        record = {"protocol": protocol, "cell": cell, "model": self.name, "measurements": measurements}
        self.store.write(key, record | {"notes": notes, "seconds": 1.0}, samples)
        return key

    def probe(self) -> None:
        top1 = self.verdicts(0)
        self.write(Cell("probe", {"seed": 0}), [("top1", {}, top1), ("knn_top1", {}, self.verdicts(0.2, 1))])

    def corruptions(self, names: Iterable[str] = NAMES, **params: Any) -> None:
        clean = {"corruption": "clean", "severity": 0}
        self.write(Cell("corruptions", {"corruption": "clean"}), [("accuracy", clean, self.verdicts(0))])
        shared = {"backend": "native", "table": "tiny-imagenet", "severities": [1, 2, 3, 4, 5]} | params
        for name in names:
            conditions = [{"corruption": name, "severity": severity} for severity in shared["severities"]]
            rows = [("accuracy", c, self.verdicts(c["severity"] / 4)) for c in conditions]
            self.write(Cell("corruptions", {"corruption": name, **shared}), rows)

    def attacks(self) -> None:
        condition = {"attack": "pgd", "norm": "linf"}
        rows = [("robust_accuracy", condition | {"eps": eps}, self.verdicts(300 * eps)) for eps in [0.0, *EPS]]
        note = "attacks use 60 of 90 test images, balanced over classes"
        self.write(Cell("attacks", condition | {"eps": EPS, "steps": 20, "images": 60}), rows, notes=[note])

    def internal(self) -> None:
        for site in SITES:
            for kind in ("channel", "location"):
                place = {"site": site, "kind": kind}
                rows = [
                    ("accuracy", place | {"level": level, "seed": seed}, self.verdicts(level, seed if level else 0))
                    for seed in range(2)
                    for level in LEVELS
                ]
                chance = Measurement("chance", CHANCE, self.images, condition=place)
                self.write(Cell("internal", place | {"levels": LEVELS[1:], "seeds": [0, 1]}), rows, further=[chance])

    def redundancy(self) -> None:
        for weights, value in (("trained", 0.3), ("untrained", 0.6)):
            condition = {"site": "prepool", "weights": weights}
            values = {"within": value + 0.1, "normalised": value, "effective_rank_total": 180.7}
            values |= {"normalised_per_position": value - 0.05}
            bounds = {"within": (value, value + 0.2), "normalised": (value - 0.1, value + 0.1)}
            measurements = [
                Measurement(m, v, self.images, *bounds.get(m, (None, None)), condition) for m, v in values.items()
            ]
            self.put(Cell("redundancy", condition), measurements)

    def everything(self) -> Writer:
        for task in (self.redundancy, self.internal, self.attacks, self.corruptions, self.probe):
            task()
        return self


def fleet(store: Store, cells: int, *, images: int = IMAGES, seeds: int = 0) -> list[str]:
    """At least ``cells`` cells of checkpoints with every task, packed; their names.

    With ``seeds``, checkpoints are runs of methods with so many seeds each. Skill rises from the first to the last.
    """
    names: list[str] = []
    made = 0
    while made < cells:
        place = len(names)
        method, seed = (place, None) if seeds == 0 else divmod(place, seeds)
        name = f"model_{method:02d}" if seed is None else f"method_{method:02d}_{seed}"
        Writer(store, name, 0.2 + 0.03 * method, seed=seed, images=images).everything()
        names.append(name)
        made = len(list((store.path / "cells").glob("*.json")))
    models = [
        {"name": name, "sha256": sha256(name.encode()).hexdigest(), "arch": "resnet18"}
        | ({"group": f"method_{i // seeds:02d}", "seed": i % seeds} if seeds else {})
        for i, name in enumerate(names)
    ]
    store.record_run({"command": "coss-eval robustness", "started": "2025-01-01T00:00:00+0000", "models": models})
    reason = store.pack()
    assert reason is None, reason
    return names
