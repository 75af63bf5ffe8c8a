"""Memory: freed blocks are kept for the next tensors; where it runs out, the batch is halved; plans need little."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.store import Store

FAULTS = """
import resource, torch
from coss_eval.training.distributed import process_group
from coss_eval.runtime.memory import keep_freed_memory
with process_group("cpu"):
    for _ in range(8):  # the first ones find their place among what imports have left
        torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)  # 64 MiB, 16,384 pages
print(keep_freed_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    own.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=own | environment, capture_output=True, text=True, timeout=120, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_blocks_of_any_size_are_used_again() -> None:
    kept, faults = kept_and_faults()
    assert kept
    assert faults < 2**14  # none at all as measured; 8 * 2**14 where each is faulted in anew


@pytest.mark.slow
def test_who_has_set_the_allocator_up_is_left_alone() -> None:
    kept, _ = kept_and_faults(MALLOC_ARENA_MAX="8")
    assert not kept


ATTACKED = """
import resource, sys
from pathlib import Path
from coss_eval.cli import main
import coss_eval.evaluation, coss_eval.tasks.attacks.task, coss_eval.reports, timm, pandas, sklearn.linear_model  # noqa
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
print("imports", peak())
room = int(sys.argv.pop(1))  # MB of address space beyond what the imports have taken
if room:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room * 10**6,) * 2)
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
print("peak", peak())
sys.exit(code)
"""
ROOM = 900
FGSM = (
    "attacks",
    "--img-size",
    "64",
    "--attack",
    "fgsm",
    "--eps",
    "2/255",
    "--limit",
    "160",
    "--data",
    "digits",
    "--device",
    "cpu",
)


def attacked(network: Path, out: Path, *words: str, room: int = 0) -> str:
    """What `coss-eval attacks` says with so many MB of memory, and "peak", the MB that were resident at most."""
    command = [sys.executable, "-c", ATTACKED, str(room), *FGSM, "--ckpt", str(network), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def figures(text: str) -> list[str]:
    """The MB resident after the imports, and at most."""
    return re.findall(r"^(?:imports|peak) (\d+)$", text, flags=re.MULTILINE)


def megabytes(text: str) -> float:
    """What a plan says that gradients need for a batch."""
    said = re.search(r"memory +about ([\d.]+) (GB|MB) for 256 images", text)
    assert said is not None, text
    return float(said[1]) * (1000 if said[2] == "GB" else 1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 at 64 px with a head for the digits."""
    path = tmp_path_factory.mktemp("network") / "r18.safetensors"
    digits = [str(number) for number in range(10)]
    save_model(make_model("resnet18", stem="cifar", width=16, img_size=64, classes=digits), path)
    return path


@pytest.fixture(scope="module")
def plenty(network: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run with all the memory it asks for: what it says, and its folder."""
    out = tmp_path_factory.mktemp("plenty")
    return attacked(network, out), out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by RLIMIT_AS and /proc")
def test_where_memory_runs_out_the_batch_is_halved_once_and_numbers_stay(
    network: Path, plenty: tuple[str, Path], tmp_path: Path
) -> None:
    """160 images at a time do not fit, 128 do: torch's own allocator says so."""
    said, out = plenty
    short = attacked(network, tmp_path, room=ROOM)
    assert "out of memory" not in said
    assert short.count("out of memory with 256 images at a time") == 1
    assert "going on with 128, which changes no number" in short
    assert "going on with 64" not in short
    (expected,), (found,) = Store(out).records(), Store(tmp_path).records()
    assert (found["key"], found["measurements"]) == (expected["key"], expected["measurements"])
    tables = [Store(folder).samples(found["key"]) for folder in (out, tmp_path)]
    assert tables[0] is not None
    assert tables[0].equals(tables[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_a_dry_run_says_what_memory_is_needed_and_needs_little(
    network: Path, plenty: tuple[str, Path], tmp_path: Path
) -> None:
    dry = attacked(network, tmp_path, "--dry-run")
    needed = megabytes(dry) * 160 / 256  # there are 160 images
    more = [int(peak) - int(imports) for text in (dry, plenty[0]) for imports, peak in [figures(text)]]
    assert needed > 500
    assert more[1] > 0.7 * needed  # a run takes about what is said
    assert more[0] < 0.4 * needed
