"""Two processes with half of every batch each train as one process with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import CASES, one_batch, short_run

from coss_eval.checkpoints.load import load_model
from coss_eval.training import log


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ddp") / "found.pt"
    script = str(Path(__file__).with_name("two_processes.py"))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=900,
        check=True,
    )
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found | {"run": out.with_name("run")}


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
    assert "16 images of a batch do not divide into 16 micro-batches" in of_two["refusal"]
