"""The benchmarks import: CI never runs them, so a name that the package loses would go unseen."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))  # they import each other
    module = importlib.import_module(path.stem)
    assert callable(module.main)


def test_there_are_benchmarks() -> None:
    assert {"attacks", "corruptions", "gpu", "gpu_speed", "internal", "merge", "training", "views"} <= {
        path.stem for path in BENCHMARKS
    }
