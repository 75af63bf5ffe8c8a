"""The notebooks run from an empty folder, use what is public, and are their .ipynb pairs, which hold no outputs."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import jupytext
import matplotlib as mpl
import pytest
from matplotlib import pyplot

from coss_eval.evaluation import Run

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
PUBLIC = {"coss_eval", "matplotlib", "numpy", "dataclasses"}
ALSO = {"02_redundancy": {"ipywidgets"}, "06_your_own": {"torch"}}  # sliders, where they are; a network of one's own
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, as a person has: the network that the first trains is there for those after it."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@each
def test_a_notebook_runs(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    mpl.use("Agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    names = runpy.run_path(str(path))
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    assert figures
    assert all(axis.has_data() for figure in figures for axis in figure.axes if axis.axison)
    pyplot.close("all")
    assert [run.failures for run in names.values() if isinstance(run, Run)] in ([], [()])
    CHECKS[path.stem](names)


# what each is about, of the objects that its cells leave behind
CHECKS: dict[str, Any] = {
    "01_first_look": lambda names: _falls(names["accuracy"], "fog"),
    "02_redundancy": lambda names: _among(names["values"]["trained"], "within", -1, 1),
    "03_receptive_fields": lambda names: _among(names["likeness"], "overlapping", names["likeness"]["disjoint"], 1),
    "04_comparing_networks": lambda names: _nearest(names["features"]["trained"], names),
    "05_paper_figures": lambda names: _among(names["difference"]._asdict(), "difference", -1, 1),
    "06_your_own": lambda names: _falls(names["mine"], "stripes"),
}


def _falls(rows: Any, corruption: str) -> None:
    """Accuracy is lower at severity 5 than at 1."""
    mine = rows[rows["corruption"] == corruption].groupby("severity")["value"].mean()
    assert mine[5] < mine[1]


def _among(values: Any, name: str, low: float, high: float) -> None:
    assert low < values[name] < high


def _nearest(features: dict[str, Any], names: dict[str, Any]) -> None:
    """The layer that the recordings were made of is the nearest to them."""
    shares = {layer: names["against_recordings"](features[layer], names["recordings"]).share for layer in features}
    assert max(shares, key=lambda layer: shares[layer]) == "stage3"
    assert shares["stage3"] < 1


@each
def test_the_pair_has_the_same_cells_and_no_outputs(path: Path) -> None:
    text, pair = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in text.cells] == [cell.source for cell in pair.cells]
    code = [cell for cell in pair.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@each
def test_it_says_what_it_shows_and_how_long_it_takes(path: Path) -> None:
    first = jupytext.read(path).cells[0].source
    assert first.startswith(f"# {int(path.stem[:2])}. ")
    assert "**What it shows.**" in first
    assert re.search(r"\*\*How long it takes\.\*\* About .*(second|minute)", first)


@each
def test_it_imports_what_is_public(path: Path) -> None:
    imported = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert {name.split(".")[0] for name in imported} <= PUBLIC | ALSO.get(path.stem, set())
    assert not any("._" in name for name in imported)
    assert "import coss_eval as ce\n" in path.read_text()


def test_there_are_six() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 7)]
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}
