"""Several processes with a part of every batch each train as one process with all of it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_run import RUN
from training_parts import TINY, digits
from two_processes import CASES, STEPPED, one_batch, several_steps, short_run

from coss_eval.checkpoints.load import load_model
from coss_eval.training import checkpoint, log
from coss_eval.training.loop import train

ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def torchrun(processes: int, script: str, *arguments: str, restarts: int = 0) -> None:
    """So many processes of a script beside this file; CalledProcessError where one fails."""
    words = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    call = [sys.executable, "-m", "torch.distributed.run", *words, str(Path(__file__).with_name(script)), *arguments]
    subprocess.run(call, env=os.environ | ALONE, timeout=1800, check=True)


def found_by(processes: int, folder: Path) -> dict[str, Any]:
    """What so many processes of two_processes.py come to."""
    out = folder / "found.pt"
    torchrun(processes, "two_processes.py", str(out))
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found | {"run": out.with_name("run"), "processes": processes}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by(2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.slow
def test_four_processes_are_one_as_two_are(tmp_path: Path) -> None:
    """All of it in one test, so that one worker starts the four, once."""
    of_four = found_by(4, tmp_path)
    for case in CASES:
        test_losses_and_gradients_are_those_of_one_process(of_four, case)
    for method in STEPPED:
        test_steps_are_those_of_one_process(of_four, method)
    test_a_run_of_two_is_that_of_one(of_four, tmp_path / "alone")
    test_a_part_that_does_not_divide_into_micro_batches_is_refused(of_four)
    test_a_process_that_does_not_see_the_state_says_so(of_four)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(of_two: dict[str, Any], case: str) -> None:
    """The loss in float32; gradients, running statistics and centres in float64, where rounding hides nothing."""
    one, two = one_batch(case, torch.float32), of_two[f"{case} torch.float32"]
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    one, two = one_batch(case, torch.float64), of_two[f"{case} torch.float64"]
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-9, rtol=1e-9)
    assert one["gradients"].keys() == two["gradients"].keys()
    for part in ("gradients", "buffers"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, atol=1e-9, rtol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_a_run_of_two_is_that_of_one(of_two: dict[str, Any], tmp_path: Path) -> None:
    short_run(tmp_path)
    losses = [[line["loss"] for line in log.read(out) if line["kind"] == "train"] for out in (tmp_path, of_two["run"])]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = (load_model(out / "model.safetensors").backbone.state_dict() for out in (tmp_path, of_two["run"]))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-3, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_a_part_that_does_not_divide_into_micro_batches_is_refused(of_two: dict[str, Any]) -> None:
    share = 32 // of_two["processes"]
    assert f"{share} images of a batch do not divide into 16 micro-batches" in of_two["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("method", STEPPED)
def test_steps_are_those_of_one_process(of_two: dict[str, Any], method: str) -> None:
    """Optimiser, moving averages, running statistics and centres over 4 steps."""
    one, several = several_steps(method), of_two["steps"][method]
    torch.testing.assert_close(several["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    assert one["weights"].keys() == several["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(
            several["weights"][key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.slow
def test_a_process_that_does_not_see_the_state_says_so(of_two: dict[str, Any]) -> None:
    said, path = of_two["divided"], of_two["run"] / "last.pt"
    assert said.startswith(f"the processes see different states of {path} (process 0 step 4, process 1 none")
    assert said.endswith("give an --out on a file system that all share")


@pytest.mark.slow
def test_a_run_goes_on_after_a_process_was_killed(tmp_path: Path) -> None:
    """torchrun starts all of them again, and they end with the bits of processes that were never killed."""
    for name, step in (("whole", "never"), ("killed", "5")):
        fields = json.dumps(RUN | {"checkpoint_minutes": 1e-9})
        torchrun(2, "interrupted_run.py", str(tmp_path / name), step, "SIGKILL", "co-byol", fields, restarts=1)
    starts = [line["step"] for line in log.read(tmp_path / "killed") if line["kind"] == "start"]
    assert starts == [0, 4]
    states = [checkpoint.load(tmp_path / name / "last.pt")["objective"] for name in ("whole", "killed")]
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@pytest.mark.slow
def test_all_processes_stop_where_one_is_asked_to_and_another_number_goes_on(tmp_path: Path) -> None:
    fields = {**TINY, "hidden": 32, "epochs": 2}
    torchrun(2, "interrupted_run.py", str(tmp_path / "run"), "4", "SIGUSR1", "byol", json.dumps(fields))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 4  # of 6, 3 an epoch
    assert len(state["inside"]["random"]) == 2
    # both from this state: float32's rounding of a sum in two parts grows in each step (in float64 all steps are equal)
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    torchrun(2, "interrupted_run.py", str(tmp_path / "two"), "never", "SIGUSR1", "byol", json.dumps(fields))
    one = train("byol", digits(), out=tmp_path / "run", device="cpu", resume=True, **fields).backbone.state_dict()
    two = load_model(tmp_path / "two" / "model.safetensors").backbone.state_dict()
    losses = [[line["loss"] for line in log.read(tmp_path / name) if "loss" in line] for name in ("run", "two")]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for key, value in two.items():
        torch.testing.assert_close(one[key], value, atol=1e-3, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
