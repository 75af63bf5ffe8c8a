"""What is committed: small enough to travel, and its results can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from coss_eval.reports.curves import read
from coss_eval.store import Store

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
INDEX = RESULTS / "README.md"


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("git cannot read this checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_tree_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert 100 < len(sizes) <= 600
    assert sum(path.is_relative_to(RESULTS) for path in sizes) <= 200
    assert sum(sizes.values()) < 16 * 2**20
    assert {path: size for path, size in sizes.items() if size > 12 * 2**20} == {}


def test_no_page_is_committed() -> None:
    """They are made by one command, and the index says by which."""
    pages = ("report.html", "curves.png", "curves.pdf")
    inside = [path.relative_to(RESULTS) for path in tracked() if path.is_relative_to(RESULTS)]
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


def test_committed_logs_have_curves() -> None:
    logs = sorted(RESULTS.glob("*/training/*.jsonl"))
    assert [log.stem for log in logs] == 2 * ["byol", "co-byol", "co-dino", "dino"]
    assert all(len(read(log).values["probe", "knn"][0]) > 10 for log in logs)
