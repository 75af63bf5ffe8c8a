"""A run that was killed goes on as if it had not been: the same bits; another configuration is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted_run import RUN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_parts import SMALL, TINY, digits

from coss_eval.checkpoints.load import load_model
from coss_eval.errors import CossError, UsageError
from coss_eval.store.runs import MODEL
from coss_eval.training import checkpoint, log
from coss_eval.training.config import Config
from coss_eval.training.interruptions import SAME_PRESS, Interruptions
from coss_eval.training.loop import LAST, TrainingProgress, train

EVERY_STEP = {"checkpoint_minutes": 1e-9}  # a state after each, of which the last one of an epoch is that of the epoch


def interrupted(out: Path, step: int, number: signal.Signals, method: str, fields: dict[str, Any]) -> int:
    """The exit code of a process that trains and sends itself a signal after ``step`` steps."""
    script = str(Path(__file__).with_name("interrupted_run.py"))
    threads = str(torch.get_num_threads())
    return subprocess.run(
        [sys.executable, script, str(out), str(step), number.name, method, json.dumps(fields)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=900,
    ).returncode


def lines(out: Path) -> list[dict[str, Any]]:
    """What a log says of the run, without its speed."""
    return [
        {key: value for key, value in line.items() if key != "images_per_second"}
        for line in log.read(out)
        if line["kind"] != "start"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "went_on", "fields"),  # 3 steps an epoch
    [(4, 3, {}), (8, 6, {}), (5, 4, {**EVERY_STEP, "log_every": 2})],
    ids=str,
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, step: int, went_on: int, fields: dict[str, Any]
) -> None:
    fields = RUN | fields
    drawn = torch.random.get_rng_state()
    whole = train("co-byol", digits(), out=tmp_path / "whole", device="cpu", **fields)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    out = tmp_path / "killed"
    assert interrupted(out, step, signal.SIGKILL, "co-byol", fields) == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    assert checkpoint.load(out / LAST)["step"] == went_on
    notes: list[str] = []
    resumed = train("co-byol", digits(), out=out, device="cpu", resume=True, on_note=notes.append, **fields)
    assert not notes
    assert resumed.sha256 == whole.sha256
    states = [checkpoint.load(folder / LAST) for folder in (tmp_path / "whole", out)]
    for key, value in states[0]["objective"].items():
        assert torch.equal(value, states[1]["objective"][key]), key
    assert lines(out) == lines(tmp_path / "whole")
    assert lines(out)[-2]["step"] == 12


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as at a terminal: what is started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_saves_inside_an_epoch_and_stops(tmp_path: Path) -> None:
    fields = {**TINY, "hidden": 32, "epochs": 2}

    def press(progress: TrainingProgress) -> None:
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    whole = train("byol", digits(), out=tmp_path / "whole", device="cpu", **fields)
    out, notes = tmp_path / "stopped", list[str]()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train("byol", digits(), out=out, device="cpu", on_progress=press, on_note=notes.append, **fields)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert len(notes) == 1
    assert re.match(r"stopped after step 4 of 6, saved in .*last\.pt; the same call with --resume", notes[0])
    assert checkpoint.load(out / LAST)["step"] == 4
    assert not (out / "lock").exists()
    resumed = train("byol", digits(), out=out, device="cpu", resume=True, **fields)
    assert resumed.sha256 == whole.sha256
    assert lines(out) == lines(tmp_path / "whole")


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruptions(0) as noted:
        signal.raise_signal(signal.SIGINT)
        noted._came += 60  # so that a slow machine's next line is soon after
        signal.raise_signal(signal.SIGINT)  # the same press, passed on by a launcher
        assert noted.look()
        assert noted.stop == signal.SIGINT
        noted._came -= 60 + SAME_PRESS
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_the_clock_asks_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Interruptions(10) as noted, Interruptions(0) as never:
        assert not noted.look()
        now += 600
        assert noted.look()
        assert not noted.stop
        assert not never.look()
        noted.saved()
        assert not noted.look()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_to_the_whole_group_saves_while_workers_decode(tmp_path: Path, number: str, code: int) -> None:
    """As a terminal, torchrun and schedulers send it."""
    generator = np.random.default_rng(0)
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data" / place).mkdir(parents=True)
        for i in range(80):
            pixels = generator.integers(0, 256, (60 + i, 140 - i, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / place / f"{i}.png")
    fields = {"size": 48, "width": 8, "batch_size": 4, "hidden": 32, "out": 16, "epochs": 1000, "log_every": 1}
    options = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    call = ["train", "--method", "byol", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *options]
    running = subprocess.Popen(
        [sys.executable, "-m", "coss_eval", *call],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    written = tmp_path / "run" / "log.jsonl"
    while running.poll() is None and not (written.exists() and len(written.read_text().splitlines()) > 3):
        time.sleep(0.1)
    os.killpg(running.pid, signal.Signals[number])
    said = running.communicate(timeout=120)[0]
    assert running.returncode == code, said
    state = checkpoint.load(tmp_path / "run" / LAST)
    assert state["inside"] is not None
    assert f"stopped after step {state['step']} of" in said
    assert "Traceback" not in said


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "predictor"), [("byol", "own"), ("co-mocov3", "own"), ("simsiam", "own"), ("co-simsiam", "shared")]
)
def test_a_multi_crop_run_goes_on_exactly(tmp_path: Path, method: str, predictor: str) -> None:
    options = SMALL[method.removeprefix("co-")]
    fields = {**TINY, "epochs": 2, "small_views": 2, "small_size": 16, "options": options}
    if predictor == "shared":
        fields["small_predictor"] = predictor

    def stop(progress: TrainingProgress) -> None:
        if progress.step == 4:
            raise Stopped

    whole = train(method, digits(), out=tmp_path / "whole", device="cpu", **fields)
    with pytest.raises(Stopped):
        train(method, digits(), out=tmp_path / "stopped", device="cpu", on_progress=stop, **fields)
    resumed = train(method, digits(), out=tmp_path / "stopped", device="cpu", resume=True, **fields)
    assert resumed.sha256 == whole.sha256
    states = [checkpoint.load(tmp_path / name / LAST)["objective"] for name in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert any(key.startswith("small_predictor.") for key in states[0]) == (predictor == "own")
    assert load_model(tmp_path / "whole" / MODEL).backbone.state_dict().keys() == whole.backbone.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "small_views", "read_as"),
    [("byol", 2, "shared"), ("byol", None, "own"), ("byol", 0, "own"), ("dino", 2, "own"), ("simclr", 2, "own")],
)
def test_a_state_from_before_small_views_had_a_predictor(
    tmp_path: Path, method: str, small_views: int | None, read_as: str
) -> None:
    """Its configuration lacks the field: all views shared the predictor, and it goes on as one that says so."""
    fields = {**TINY, "epochs": 1, "options": SMALL[method], "small_size": 16, "small_views": small_views}
    said = {"small_predictor": "shared"} if read_as == "shared" else {}
    train(method, digits(), out=tmp_path, device="cpu", **fields, **said)
    state = checkpoint.load(tmp_path / LAST)
    assert not any(key.startswith("small_predictor") for key in state["objective"])
    del state["config"]["small_predictor"], state["version"]
    checkpoint.save(tmp_path / LAST, state)
    assert Config.from_dict(state["config"]).small_predictor == read_as
    train(method, digits(), out=tmp_path, device="cpu", resume=True, **fields, **said)
    if said:
        with pytest.raises(UsageError, match="small_predictor: 'own', there 'shared'"):
            train(method, digits(), out=tmp_path, device="cpu", resume=True, **fields)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing_and_a_missing_one_starts(tmp_path: Path) -> None:
    fields = {**RUN, "epochs": 1}
    first = train("byol", digits(), out=tmp_path, device="cpu", resume=True, **_plain(fields))
    again = train("byol", digits(), out=tmp_path, device="cpu", resume=True, **_plain(fields))
    assert first.sha256 == again.sha256


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    fields = _plain({**RUN, "epochs": 1})
    train("byol", digits(), out=tmp_path, device="cpu", **fields)
    with pytest.raises(UsageError, match="pass --resume"):
        train("byol", digits(), out=tmp_path, device="cpu", **fields)
    with pytest.raises(UsageError, match=r"lr: 0.25, there 0.5; options.hidden: 48, there 32"):
        train("byol", digits(), out=tmp_path, device="cpu", resume=True, **{**fields, "lr": 0.25, "hidden": 48})
    with pytest.raises(UsageError, match="images are others"):
        train("byol", digits(128), out=tmp_path, device="cpu", resume=True, **fields)
    train("byol", digits(), out=tmp_path, device="cpu", resume=True, **{**fields, "log_every": 7})
    whole = (tmp_path / LAST).read_bytes()
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle : middle + 100])
    (tmp_path / LAST).write_bytes(whole[:middle] + flipped + whole[middle + 100 :])
    with pytest.raises(CossError, match="is damaged"):
        train("byol", digits(), out=tmp_path, device="cpu", resume=True, **fields)
    (tmp_path / LAST).unlink()
    for resume, told in ((False, "holds a run already"), (True, "without its last.pt")):
        with pytest.raises(UsageError, match=told):
            train("byol", digits(), out=tmp_path, device="cpu", resume=resume, **fields)
    (tmp_path / LAST).write_bytes(b"torn")
    with pytest.raises(CossError, match="no trainer state"):
        train("byol", digits(), out=tmp_path, device="cpu", resume=True, **fields)


def _plain(fields: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key not in ("sampling", "local_grid")}


def test_both_logs_hold_every_step_once(tmp_path: Path) -> None:
    """JSON lines and TensorBoard say the same after a run was interrupted and resumed."""
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
