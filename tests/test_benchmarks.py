"""The benchmarks import: CI never runs them at length, so a name that the package loses would go unseen."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from coss_eval.store import Store

SHORT = ("full-disk", "read-only", "damaged-samples", "loose", "failing-cell")  # the long form: benchmarks/faults.py
BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))  # they import each other
    module = importlib.import_module(path.stem)
    assert callable(module.main)


def test_the_benchmark_of_reports_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it runs is text, in which an import sees nothing of a name that has moved."""
    monkeypatch.syspath_prepend(str(BENCHMARKS[0].parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "reports"))
    report = importlib.import_module("report")
    importlib.import_module("synthetic_runs").fleet(Store(tmp_path / "store"), cells=1)
    for work in (report.PLAIN, report.NO_FIGURES, report.REPORT):
        seconds, peak = report.measured(work, str(tmp_path / "store"), str(tmp_path / "out"))
        assert seconds > 0
        assert peak > 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's limits and capabilities")
@pytest.mark.parametrize("name", SHORT)
def test_a_fault_leaves_what_an_undisturbed_run_stores(name: str, faults: Any, tmp_path: Path) -> None:
    row = faults.CASES[name](tmp_path)
    assert row.good, row


@pytest.fixture(scope="module")
def faults() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS[0].parent))
        return importlib.import_module("faults")


def test_there_are_benchmarks() -> None:
    assert {"attacks", "corruptions", "gpu", "gpu_speed", "internal", "merge", "training", "views"} <= {
        path.stem for path in BENCHMARKS
    }
