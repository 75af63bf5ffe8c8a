"""Fixtures shared by all tests: the real images, found next to the checkout or through COSS_DATA_ROOT."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # each has its share of the cores: threads of several processes that wait for one another lose tenfold
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # for processes that tests start
os.environ.pop("COLUMNS", None)  # which a worker gets: what is printed is as wide as in a file, unless a test says so
os.unsetenv("COLUMNS")  # readline, which pytest imports, may have set it past os.environ

ON_EITHER = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked cuda are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=ON_EITHER)
def either_device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device where there is one: a test's body is run by every machine."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """The files that git knows, from the checkout's root; tests that need them skip where there is no git."""
    root = Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("git cannot read this checkout")
    return [Path(name) for name in done.stdout.split("\0") if name and (root / name).is_file()]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets; tests that need it skip where it is absent."""
    root = Path(os.environ.get("COSS_DATA_ROOT", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "tiny-imagenet-50").is_dir():
        pytest.skip("real images are absent: set COSS_DATA_ROOT to a folder that holds tiny-imagenet-50")
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in the user's cache directory."""
    monkeypatch.setenv("COSS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
