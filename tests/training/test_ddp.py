"""Two processes with half of every batch each train as one process with all of it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import METHODS, one_batch


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
def test_losses_and_gradients_are_those_of_one_process(of_two: dict[str, Any], method: str) -> None:
    """The loss in float32; gradients, running statistics and centres in float64, where rounding hides nothing."""
    one, two = one_batch(method, torch.float32), of_two[f"{method} torch.float32"]
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-5, rtol=1e-5)
    one, two = one_batch(method, torch.float64), of_two[f"{method} torch.float64"]
    torch.testing.assert_close(two["losses"], one["losses"], atol=1e-9, rtol=1e-9)
    assert one["gradients"].keys() == two["gradients"].keys()
    for part in ("gradients", "buffers"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, atol=1e-9, rtol=1e-7, msg=lambda m, k=key: f"{k}: {m}")
