"""The notebooks' code runs from an empty folder."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    names = runpy.run_path(str(path))
    assert len(names["frame"]) > 20
    assert not names["run"].failures


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
