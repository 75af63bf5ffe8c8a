"""Fixtures of the reports' tests: stores with one or two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_runs import Writer

from coss_eval.corruptions.names import NAMES
from coss_eval.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


@pytest.fixture
def writer(store: Store) -> Callable[..., Writer]:
    """Call it with a checkpoint's name and skill, then its tasks."""
    return lambda name, skill=0.5, **options: Writer(store, name, skill, **options)


@pytest.fixture
def full(store: Store, writer: Callable[..., Writer]) -> Store:
    """Two checkpoints with every task; the second lacks frost."""
    store.record_run(
        {
            "command": "coss-eval robustness --ckpt b.pth --ckpt a_1.pth",
            "started": "2025-01-01T00:00:00+0000",
            "device": "cpu",
            "threads": 4,
            "seed": 0,
            "versions": {"torch": "2.15"},
            "models": [{"name": "b", "layout": "dino"}, {"name": "a_1", "layout": "torchvision"}],
        }
    )
    writer("b", 0.5).everything()
    second = writer("a_1", 1.5)
    for task in (second.probe, second.attacks, second.internal, second.redundancy):
        task()
    second.corruptions([name for name in NAMES if name != "frost"])
    return store
