"""What is committed: small enough to travel, and its results can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from coss_eval.reports.curves import read
from coss_eval.store import Store
from coss_eval.store.runs import Runs
from coss_eval.sweeps.plan import read_sweep
from coss_eval.sweeps.state import settled, states

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
INDEX = RESULTS / "README.md"


def test_the_tree_stays_small(tracked: list[Path]) -> None:
    sizes = {ROOT / path: (ROOT / path).stat().st_size for path in tracked}
    assert 100 < len(sizes) <= 540
    assert sum(path.is_relative_to(RESULTS) for path in sizes) <= 200
    assert sum(sizes.values()) < 16 * 2**20
    assert {path: size for path, size in sizes.items() if size > 12 * 2**20} == {}


def test_no_page_is_committed(tracked: list[Path]) -> None:
    """They are made by one command, and the index says by which."""
    pages = ("report.html", "curves.png", "curves.pdf")
    inside = [path.relative_to(RESULTS.name) for path in tracked if path.is_relative_to(RESULTS.name)]
    assert [path for path in inside if path.name in pages or {"figures", "tables"} & set(path.parts)] == []
    assert {path.parts[0] for path in inside if len(path.parts) > 1} == set(named_runs())  # every folder has its line
    assert "coss-eval report results/NAME" in INDEX.read_text()


def named_runs() -> list[str]:
    return re.findall(r"^\| `([\w-]+)` \|", INDEX.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("run", "cells", "model", "top1", "n"),
    [
        ("tiny-imagenet-50-supervised", 43, "tiny-imagenet-50-supervised", 0.4016, 2500),
        ("cifar10-jpeg-supervised", 43, "cifar10-jpeg-supervised", 0.7516, 2500),
        ("tiny-imagenet-50-ssl-laptop", 128, "co-byol", 0.2944, 2500),
        ("cifar10-jpeg-ssl-laptop", 128, "co-byol", 0.6114, 10000),
    ],
)
def test_committed_results_are_read(run: str, cells: int, model: str, top1: float, n: int) -> None:
    """All cells of a run, the linear probe's accuracy among them, and verdicts that have it for their mean."""
    store = Store(RESULTS / run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = store.records()
        assert len(records) == cells
        ((key, measured),) = [
            (record["key"], m)
            for record in records
            for m in record["measurements"]
            if (record["task"], record["model"], m["metric"], m["condition"]) == ("probe", model, "top1", {})
        ]
        assert (measured["value"], measured["n"]) == (top1, n)
        table = store.samples(key)
    assert table is not None
    assert len(table) == n
    assert table["top1"].mean() == pytest.approx(top1, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "size", "packed", "partly"), [("co-claims", None, 5, 0), ("co-claims-gpu", "gpu", 11, 4)]
)
def test_the_page_of_a_committed_study_is_made_from_its_packed_runs(
    folder: str, size: str | None, packed: int, partly: int, tmp_path: Path, tracked: list[Path]
) -> None:
    """No finished run has a folder of its own; the numbers beside the pack are what the pack says."""
    for file in ("runs.zip", "epochs.json"):
        if (RESULTS / folder / file).exists():
            shutil.copy2(RESULTS / folder / file, tmp_path / file)
    assert len(Runs(tmp_path).names()) >= packed
    assert [
        path for path in tracked if path.is_relative_to(Path(RESULTS.name) / folder) and path.name == "job.json"
    ] == []
    sweep = settled(read_sweep("co-claims", size), tmp_path)
    everything = states(sweep, tmp_path, tmp_path)
    assert sum(state.stage == "trained" for state in everything) == partly  # not evaluated whole
    assert sum(state.stage == "done" for state in everything) == len(Runs(tmp_path).names()) - partly
    size_words = ["--size", size] if size else []
    words = ["-m", "coss_eval", "sweep", "co-claims", *size_words, "--out", str(tmp_path), "--page"]
    subprocess.run([sys.executable, *words], check=True)  # on any machine: nothing is trained
    page = (tmp_path / "report.md").read_text()
    assert page == (RESULTS / folder / "report.md").read_text()
    assert "(0 seeds)" not in page  # methods without a run are named at the end, and take no row of table or figure
    assert "figures/scores.png" in page
    assert (tmp_path / "figures" / "scores.png").exists()


def test_committed_logs_have_curves() -> None:
    runs = [folder / name for folder in sorted(RESULTS.glob("*/training")) for name in Runs(folder).names()]
    assert [run.name for run in runs] == 2 * ["byol", "co-byol", "co-dino", "dino"]
    curves = [read(run) for run in runs]
    assert all(len(one.values["probe", "knn"][0]) > 10 for one in curves)
    assert [one.name for one in curves] == [run.name for run in runs]
