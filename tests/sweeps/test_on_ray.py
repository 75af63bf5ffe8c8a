"""Cells and runs on a real cluster of Ray's, of two nodes on this machine: one is killed, nothing is done twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from coss_eval import evaluation
from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation.planning import Plan, plan
from coss_eval.store import Store
from coss_eval.sweeps.on_ray import CELLS, Cluster, SweepOnRay, chunks, connected, execute_on_ray
from coss_eval.sweeps.plan import read_sweep
from coss_eval.sweeps.state import states
from coss_eval.sweeps.work import Worker

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'coss-eval[ray]'")
COMMAND = [sys.executable, "-m", "coss_eval"]
NETWORKS = ["pixels:8", "pixels:4"]


def planned(out: Path, tasks: list[str] | None = None, limit: int = 60) -> Plan:
    """A plan of many short cells on the digits."""
    return plan(NETWORKS, "digits", out=out, tasks=tasks or ["corruptions", "internal"], limit=limit, device="cpu")


def measured(out: Path) -> dict[str, Any]:
    """All numbers of a folder by their cells' keys."""
    return {record["key"]: (record["model"], record["measurements"]) for record in Store(out).records()}


def test_every_job_is_in_one_chunk(tmp_path: Path) -> None:
    jobs = 2 * planned(tmp_path, ["corruptions"]).jobs
    for places, size in ((1, CELLS), (2, 4), (100, 1)):
        found = chunks(jobs[:34], places)
        assert [number for numbers in found for number in numbers] == list(range(34))
        assert max(map(len, found)) == size


def test_a_wrong_cluster_is_one_line() -> None:
    with pytest.raises(UsageError, match="--device cuda, not cuda:1"):
        Cluster(device="cuda:1")
    with pytest.raises(UsageError, match="cpus-per-job"):
        Cluster(cpus=0)


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_an_address_that_nobody_answers_is_one_line(address: str) -> None:
    with (
        pytest.raises(CossError, match=r"nobody answers at .*ray start --head") as caught,
        connected(Cluster(address=address)),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_line_says_what_to_install(tmp_path: Path) -> None:
    command = [*COMMAND, "crops", "--ckpt", "pixels:8", "--limit", "20", "--out", str(tmp_path), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "coss-eval: --engine ray needs Ray: pip install 'coss-eval[ray]'\n")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs and a node with one, as processes of this machine; tests add nodes and kill them."""
    from ray.cluster_utils import Cluster as Nodes

    small = {"object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")  # of a machine that does much else
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        try:
            nodes.add_node(num_cpus=1, **small)
            yield nodes
        finally:
            nodes.shutdown()


def until(holds: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


@needs_ray
@pytest.mark.slow
def test_a_node_is_killed_and_every_cell_is_there_once(cluster: Any, tmp_path: Path) -> None:
    evaluation.execute(planned(tmp_path / "here"))
    there = tmp_path / "there"
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    made = dict[str, list[int]]()

    def watch(now: evaluation.Progress) -> None:
        """Each file that a cell was ever stored as; the node goes when a quarter is done."""
        nonlocal node
        for path in (there / "cells").glob("*.json*"):
            if (inode := path.stat().st_ino) not in made.setdefault(path.name, []):
                made[path.name].append(inode)
        if node is not None and now.done >= now.total // 4:
            cluster.remove_node(node, allow_graceful=False)
            node = None

    job = planned(there)
    run = execute_on_ray(job, Cluster(address=cluster.address, device="cpu"), on_progress=watch)
    assert run.failures == ()
    assert node is None
    assert measured(there) == measured(tmp_path / "here")
    assert len(measured(there)) == job.missing
    assert set(made) <= {f"{key}.json" for key in measured(there)}  # no second copies
    assert all(len(inodes) == 1 for inodes in made.values())  # written once
    (entry,) = Store(there).runs()
    assert entry["engine"].startswith("ray ")
    assert planned(there).missing == 0


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_leaves_a_store_that_goes_on(cluster: Any, tmp_path: Path) -> None:
    flags = [word for name in NETWORKS for word in ("--ckpt", name)]
    command = [*COMMAND, "corruptions", *flags, "--limit", "60", "--device", "cpu", "--out", str(tmp_path), "--quiet"]
    command += ["--engine", "ray", "--address", cluster.address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: len(Store(tmp_path).loose_keys()) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert 0 < len(kept) < planned(tmp_path, ["corruptions"]).missing + len(kept)
    run = execute_on_ray(planned(tmp_path, ["corruptions"]), Cluster(address=cluster.address, device="cpu"))
    assert run.failures == ()
    evaluation.execute(planned(tmp_path / "here", ["corruptions"]))
    assert measured(tmp_path) == measured(tmp_path / "here")


@needs_ray
@pytest.mark.slow
def test_a_sweep_on_two_nodes_is_that_of_one_machine(cluster: Any, tmp_path: Path) -> None:
    fixed = {"size": 8, "width": 8, "epochs": 2, "warm_up_epochs": 0, "probe_every": 0, "hidden": 16}
    entries = {"data": "digits", "preset": "digits-tiny", "methods": ["byol", "simclr"], "threads": 1, "fixed": fixed}
    path, out = tmp_path / "sweep.yaml", tmp_path / "there"
    path.write_text(yaml.safe_dump(entries | {"grid": {"crop_min_scale": [0.4]}}))
    sweep, told = read_sweep(path), list[str]()
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    on_ray = SweepOnRay(
        sweep, out, out, Cluster(address=cluster.address, device="cpu"), on_run=lambda run, what: told.append(what)
    )
    assert on_ray.run() == []
    cluster.remove_node(node, allow_graceful=False)
    assert sorted(told) == ["has been evaluated"] * 2 + ["has been trained"] * 2
    assert [state.stage for state in states(sweep, out, out)] == ["done"] * 2
    assert Worker(sweep, tmp_path / "here", tmp_path / "here", device="cpu").run() == []
    for state in states(sweep, out, out):
        here = json.loads((tmp_path / "here" / state.run.name / "job.json").read_text())
        assert state.record["sha256"] == here["sha256"]
        assert measured(out / state.run.name / "results") == measured(tmp_path / "here" / state.run.name / "results")
    assert on_ray.run() == []  # nothing is left to do
    assert len(told) == 4
