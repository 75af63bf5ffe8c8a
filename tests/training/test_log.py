"""The two logs of a run, JSON lines and TensorBoard, say the same after it was interrupted and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coss_eval.training import log


def test_both_logs_hold_every_step_once(tmp_path: Path) -> None:
    for done, last in ((0, 6), (4, 9)):  # stopped after step 6, resumed from the checkpoint of step 4
        run = log.RunLog(tmp_path, done)
        for step in range(done + 1, last):
            run.write("train", step, loss=1 / step, note="numbers alone go to TensorBoard")
        run.close()
    expected = {step: pytest.approx(1 / step) for step in range(1, 9)}
    assert {line["step"]: line["loss"] for line in log.read(tmp_path)} == expected
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"]
    assert {event.step: event.value for event in board.Scalars("train/loss")} == expected
    assert len(board.Scalars("train/loss")) == len(log.read(tmp_path)) == 8
