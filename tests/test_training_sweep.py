"""Sweeps: what a YAML asks for, runs that are resumed, shared and left to others, and the report at any time."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from coss_eval import sweep as sweeping
from coss_eval import training
from coss_eval._disk import Lock
from coss_eval.errors import UsageError
from coss_eval.reports import sweeps
from coss_eval.reports.drawing import style
from coss_eval.reports.results import Estimate
from coss_eval.store import Store

FIXED = {"size": 16, "width": 16, "epochs": 1, "warm_up_epochs": 0, "batch_size": 32, "probe_every": 0, "hidden": 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 16 px images, told apart by their colour."""
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label in range(3):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3)) + 80 * (np.arange(3) == label)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def written(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """A sweep's YAML with some entries changed."""

    def write(**entries: Any) -> Path:
        grid = {"crop_min_scale": [0.2, 0.8]}
        default = {"data": str(images), "preset": "digits-tiny", "methods": ["byol"], "grid": grid, "fixed": FIXED}
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in {**default, **entries}.items() if v is not None}, sort_keys=False)
        )
        return path

    return write


def test_jobs_are_the_grid_by_methods_and_seeds(written: Callable[..., Path]) -> None:
    grid = {"crop_min_scale": [0.2, 0.8], "arch": ["resnet18", "rf29_resnet18"]}
    found = sweeping.jobs(sweeping.read_sweep(written(methods=["byol", "co-byol"], grid=grid, seeds=[0, 7])))
    assert [job.number for job in found] == list(range(1, 17))
    assert len({job.name for job in found}) == 16
    assert [job.config.seed for job in found] == [0] * 8 + [7] * 8
    assert found[3].name == "co-byol-crop_min_scale=0.2-arch=rf29_resnet18-seed=0"
    assert (found[3].config.crop_min_scale, found[3].config.arch) == (0.2, "rf29_resnet18")
    assert found[3].config.epochs == 1


def test_a_sweep_without_a_grid_is_over_c_min(written: Callable[..., Path]) -> None:
    found = sweeping.jobs(sweeping.read_sweep(written(grid=None)))
    assert [job.config.crop_min_scale for job in found] == [0.08, 0.2, 0.4, 0.6, 0.8]


@pytest.mark.parametrize("name", training.sweeps())
def test_shipped_sweeps_are_valid(name: str) -> None:
    assert len(sweeping.jobs(sweeping.read_sweep(name))) >= 4


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"methods": None}, "methods"),
        ({"method": "byol"}, "methods"),
        ({"methods": "byol"}, "list"),
        ({"methods": ["co-byo"]}, "co-byol"),
        ({"preset": "digit-tiny"}, "digits-tiny"),
        ({"grid": {"crop_min_scal": [0.2]}}, "crop_min_scale"),
        ({"grid": {"crop_min_scale": 0.2}}, "list"),
        ({"grid": {"crop_min_scale": []}}, "list"),
        ({"grid": {"crop_min_scale": [0.2, 1.2]}}, "at most 1, got 1.2"),
        ({"grid": {"crop_min_scale": [0.0]}}, "above 0"),
        ({"grid": {"crop_min_scale": ["small"]}}, "small"),
        ({"grid": {"crop_min_scale": [0.2, 0.2]}}, "twice"),
        ({"grid": {"local_weight": [0.2]}}, "co-byol"),
        ({"fixed": {"epoch": 1}}, "epochs"),
        ({"fixed": {"seed": 1}}, "entries of its own"),
        ({"seeds": ["a"]}, "seed"),
    ],
)
def test_a_bad_sweep_is_one_line(entries: dict[str, Any], expected: str, written: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=expected) as caught:
        sweeping.jobs(sweeping.read_sweep(written(**entries)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["methods: [byol", "- a\n- b\n", ""])
def test_what_is_no_sweep_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml") as caught:
        sweeping.read_sweep(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="crops"):
        sweeping.read_sweep("crop")


def test_from_one_job_to_all_with_a_report_each_time(written: Callable[..., Path], tmp_path: Path) -> None:
    sweep, out = sweeping.read_sweep(written(methods=["byol", "co-byol"])), tmp_path / "out"
    told: list[str] = []

    def run(**options: Any) -> list[str]:
        told.clear()
        tell = lambda job, what: told.append(f"{job.number} {what}")  # noqa: E731
        assert sweeping.run(sweep, out, device="cpu", on_job=tell, **options) == []
        return told

    assert [trial.state for trial in sweeping.progress(sweep, out)] == ["missing"] * 4
    assert run(number=2) == ["2 begins"]
    report = (out / "report.md").read_text()
    assert "3 of 4 runs are missing" in report
    assert "1 byol-crop_min_scale=0.2-seed=0 (missing)" in report
    assert (out / "figures" / "sweep.png").exists()

    lock = Lock.take(_folder(out / "byol-crop_min_scale=0.8-seed=0") / "job.lock")
    assert lock is not None
    assert run() == ["1 begins", "2 is done already", "3 is being done by another process", "4 begins"]
    lock.release()
    assert run() == ["1 is done already", "2 is done already", "3 begins", "4 is done already"]

    report = (out / "report.md").read_text()
    assert "missing" not in report
    assert "| crop_min_scale 0.8 |" in report
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["done"] * 4
    assert all(float(row["top1_low"]) <= float(row["top1"]) <= float(row["top1_high"]) for row in rows)
    models = {record["model"] for record in Store(out / "results").records()}
    assert models == {job.name for job in sweeping.jobs(sweep)}

    other = sweeping.read_sweep(written(methods=["byol", "co-byol"], fixed={**FIXED, "lr": 0.3}))
    with pytest.raises(UsageError, match=r"lr: 0.3, there 0.2.*--out"):
        sweeping.run(other, out, device="cpu")
    with pytest.raises(UsageError, match="1 to 4, not 5"):
        sweeping.run(sweep, out, number=5)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_failed_run_is_named_and_the_others_run(written: Callable[..., Path], tmp_path: Path) -> None:
    grid = {"lr": [1e30, 0.1]}
    sweep = sweeping.read_sweep(written(grid=grid))
    failures = sweeping.run(sweep, tmp_path / "out", device="cpu")
    assert len(failures) == 1
    assert "step" in failures[0]
    assert [trial.state for trial in sweeping.progress(sweep, tmp_path / "out")][1] == "done"


@pytest.mark.slow
def test_a_killed_run_goes_on(written: Callable[..., Path], tmp_path: Path) -> None:
    path, out = written(grid={"crop_min_scale": [0.2]}, fixed={**FIXED, "epochs": 6}), tmp_path / "out"
    script = "import sys; from coss_eval.cli import main; sys.argv[0] = 'coss-eval'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sweep", str(path), "--out", str(out), "--device", "cpu"],
        env=os.environ,
        start_new_session=True,
    )
    folder = out / "byol-crop_min_scale=0.2-seed=0"
    deadline = time.monotonic() + 60
    while not (folder / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    sweep = sweeping.read_sweep(path)
    assert [trial.state for trial in sweeping.progress(sweep, out)] == ["begun"]
    assert sweeping.run(sweep, out, device="cpu") == []
    assert [trial.state for trial in sweeping.progress(sweep, out)] == ["done"]
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def trial(method: str, c_min: float, seed: int, value: float | None, **varied: Any) -> sweeps.Trial:
    scores = {} if value is None else {s: Estimate(value, value - 0.05, value + 0.05, 100) for s in sweeps.SCORES}
    state = "missing" if value is None else "done"
    return sweeps.Trial(1, "x", method, {"crop_min_scale": c_min, **varied}, seed, state, scores)


def test_seeds_are_the_unit_where_there_are_several() -> None:
    one = sweeps.summary([trial("byol", 0.2, 0, 0.5)], "top1")
    assert one is not None
    assert (one.low, one.high) == (0.45, 0.55)
    three = sweeps.summary([trial("byol", 0.2, seed, v) for seed, v in enumerate((0.5, 0.52, 0.54, None))], "top1")
    assert three is not None
    assert three.value == pytest.approx(0.52)
    assert three.high - three.value == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)  # Student's t, 2 df


def test_the_table_has_a_gap_where_no_run_is_done_and_heads_the_other_fields() -> None:
    trials = [
        trial(method, c_min, 0, None if (method, c_min) == ("byol", 0.8) else 0.5, arch=arch)
        for arch in ("rf17_resnet18", "rf29_resnet18")
        for c_min in (0.8, 0.2)
        for method in ("byol", "co-byol")
    ]
    table = sweeps.table(trials, "top1")
    assert [(row.group, row.name) for row in table.rows] == [
        (arch, f"crop_min_scale {c}") for arch in ("rf17_resnet18", "rf29_resnet18") for c in ("0.2", "0.8")
    ]
    assert table.gaps == 2
    with style():
        assert len(sweeps.draw(trials).axes) == 2


@pytest.mark.parametrize("varied", [{}, {"arch": "resnet18"}, {"arch": "resnet34"}])
def test_figures_of_any_grid_are_drawn(varied: dict[str, Any], tmp_path: Path) -> None:
    scores = trial("", 0.2, 0, 0.5).scores
    trials = [sweeps.Trial(i, "x", method, varied, 0, "done", scores) for i, method in enumerate(("byol", "dino"))]
    paths = sweeps.write(trials, tmp_path, title="Sweep", about=["about"])
    assert all(path.exists() for path in paths)
