"""Training curves from logs: what is read, what is drawn, and clear words where there is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coss_eval.errors import UsageError
from coss_eval.reports.curves import draw, read, write
from coss_eval.reports.drawing import style


def log(folder: Path, epochs: int, *, probes: bool = True) -> Path:
    folder.mkdir()
    lines = [{"kind": "start", "step": 0, "config": {"method": "byol"}}]
    for epoch in range(1, epochs + 1):
        lines.append({"kind": "train", "step": 10 * epoch, "epoch": epoch, "loss": 2 / epoch, "global": 1 / epoch})
        if probes:
            seen = {"knn": 0.1 * epoch, "linear": None, "effective_rank": 4.0, "alarm": None}
            lines.append({"kind": "probe", "step": 10 * epoch, "epoch": epoch, **seen})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return folder


def test_values_stand_over_their_epochs_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    run = read(log(tmp_path / "byol", 3))
    assert run.name == "byol"
    assert run.values["probe", "knn"] == ([1, 2, 3], pytest.approx([0.1, 0.2, 0.3]))
    assert run.values["train", "global"] == ([1, 2, 3], pytest.approx([1, 1 / 2, 1 / 3]))
    assert ("probe", "linear") not in run.values


@pytest.mark.parametrize(("probes", "panels"), [(True, 3), (False, 1)])
def test_only_panels_with_values_are_drawn(tmp_path: Path, probes: bool, panels: int) -> None:
    runs = [read(log(tmp_path / name, 2, probes=probes)) for name in ("byol", "co-byol")]
    with style():
        axes = [axis for axis in draw(runs).axes if axis.get_visible()]
    assert [len(axis.lines) for axis in axes] == [2] * panels


def test_files_and_missing_logs(tmp_path: Path) -> None:
    paths = write([log(tmp_path / "byol", 2)], tmp_path / "figures")
    assert sorted(path.name for path in paths) == ["curves.pdf", "curves.png"]
    with pytest.raises(UsageError, match="no log"):
        read(tmp_path / "nothing")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="finish an epoch"):
        read(tmp_path / "empty.jsonl")
