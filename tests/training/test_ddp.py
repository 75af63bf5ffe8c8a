"""Two processes with half of every batch each train as one process with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import METHODS, two_steps


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
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_weights_are_those_of_one_process(of_two: dict[str, Any], method: str) -> None:
    one, two = two_steps(method), of_two[method]
    torch.testing.assert_close(two["losses"][0], one["losses"][0], atol=1e-5, rtol=1e-5)
    # the second step has seen the gradient of the first
    torch.testing.assert_close(two["losses"][1], one["losses"][1], atol=1e-4, rtol=1e-4)
    for key, value in one["objective"].items():
        torch.testing.assert_close(two["objective"][key], value, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
