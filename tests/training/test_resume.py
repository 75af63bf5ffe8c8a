"""A run that was killed goes on as if it had not been: the same bits; another configuration is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted_run import RUN
from training_parts import SMALL, TINY, digits

from coss_eval.checkpoints.load import load_model
from coss_eval.errors import CossError, UsageError
from coss_eval.training import checkpoint, log
from coss_eval.training.config import Config
from coss_eval.training.loop import LAST, MODEL, TrainingProgress, train


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 8])  # 3 steps an epoch: in the middle of the second, and of the third
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, steps: int) -> None:
    drawn = torch.random.get_rng_state()
    whole = train("co-byol", digits(), out=tmp_path / "whole", device="cpu", **RUN)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    out = tmp_path / "killed"
    script = Path(__file__).with_name("interrupted_run.py")
    threads = str(torch.get_num_threads())
    ended = subprocess.run(
        [sys.executable, str(script), str(out), str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=900,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    notes: list[str] = []
    resumed = train("co-byol", digits(), out=out, device="cpu", resume=True, on_note=notes.append, **RUN)
    assert not notes
    assert resumed.sha256 == whole.sha256
    states = [checkpoint.load(folder / LAST) for folder in (tmp_path / "whole", out)]
    for key, value in states[0]["objective"].items():
        assert torch.equal(value, states[1]["objective"][key]), key
    assert [line["step"] for line in log.read(out) if line["kind"] == "train"] == list(range(1, 13))


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
