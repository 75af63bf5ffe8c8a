"""Memory: freed blocks are kept for the next tensors; a plan says what a run needs, and needs less."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.runtime.memory import bytes_for_gradients

FAULTS = """
import resource, torch
from coss_eval.runtime.processes import process_group
from coss_eval.runtime.memory import keep_freed_memory
with process_group("cpu"):
    for _ in range(32):  # the first ones find their place among what imports have left
        torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)  # 64 MiB, 16,384 pages
print(keep_freed_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(script: str = FAULTS, **environment: str) -> tuple[bool, int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    own.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=own | environment, capture_output=True, text=True, timeout=120, check=True
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


GIVEN_BACK = """
import resource, torch
from coss_eval.runtime.memory import give_memory_back
give_memory_back(torch.device("cpu"))
for _ in range(64):  # the first ones find their place among what imports have left
    torch.ones(2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**20)  # 4 MiB, 1,024 pages: mapped singly from 1 MiB on, where nobody has said from which size on
print(True, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_memory_is_given_back_as_whoever_has_set_the_allocator_up_said() -> None:
    by_hand = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
    assert kept_and_faults(GIVEN_BACK)[1] > 2**12
    assert kept_and_faults(GIVEN_BACK, **by_hand)[1] < 2**12


ATTACKED = """
import sys
from coss_eval.cli import main
from coss_eval.runtime.memory import most_resident
import coss_eval.evaluation, coss_eval.tasks.attacks.task, coss_eval.reports, timm, pandas, sklearn.linear_model  # noqa
peak = lambda: most_resident() // 10**6
print("imports", peak())
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
print("peak", peak())
sys.exit(code)
"""
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


def attacked(network: Path, out: Path, *words: str) -> str:
    """What `coss-eval attacks` says, and how many MB were resident after its imports, and at most."""
    command = [sys.executable, "-c", ATTACKED, *FGSM, "--ckpt", str(network), "--out", str(out), *words]
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


def test_what_gradients_would_need_is_counted_and_freed() -> None:
    """A sigmoid keeps its output: counted, and not held by the graph for ever."""
    pixels, made = torch.rand(1000, requires_grad=True), list[weakref.ref[torch.Tensor]]()

    def forward() -> torch.Tensor:
        out = pixels.sigmoid()
        made.append(weakref.ref(out))
        return out

    assert bytes_for_gradients(forward) == 4 * 1000
    assert made[0]() is None


STEP = """
import sys, torch
from coss_eval.checkpoints.load import load_model
from coss_eval.runtime.memory import most_resident
network = load_model(sys.argv[1]).backbone.eval().requires_grad_(False)
def attack(images):  # the gradient of the pixels, as FGSM takes it
    pixels = torch.rand(images, 3, 64, 64, requires_grad=True)
    network.represent(pixels).global_.sum().backward()
attack(2)
before = most_resident()
attack(160)
print((most_resident() - before) // 10**6)
"""


@pytest.mark.slow
def test_a_dry_run_says_what_memory_is_needed_and_needs_little(tmp_path: Path) -> None:
    """What is said is what a gradient of so many images takes in a process of its own."""
    path, digits = tmp_path / "r18.safetensors", [str(number) for number in range(10)]
    save_model(make_model("resnet18", stem="cifar", width=32, img_size=64, classes=digits), path)
    text = attacked(path, tmp_path / "out", "--dry-run")
    needed = megabytes(text) * 160 / 256
    done = subprocess.run([sys.executable, "-c", STEP, str(path)], capture_output=True, text=True, check=True)
    taken = int(done.stdout)
    assert 0.7 * needed < taken < 1.5 * needed  # on the way back there is a layer's gradient, too
    imports, peak = map(int, figures(text))
    assert peak - imports < 0.6 * megabytes(text)  # a pass of a whole batch, 256 images, without gradients


SHORT = """
import ctypes, json, re, resource, sys, warnings
from pathlib import Path
import coss_eval as ce
from coss_eval.checkpoints.load import load_model
from coss_eval.store import Store
from coss_eval.tasks.attacks.task import Attacks

network, digits = load_model(sys.argv[1], img_size=64), ce.load_dataset("digits")

def attacked(images, out):  # measurements, and what was said of memory
    task = Attacks((("fgsm", "linf"),), {"linf": (2 / 255,)}, images=images, checked_images=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = ce.evaluate(network, digits, [task], out=out, batch_size=96, cache=False, quiet=True, device="cpu")
    assert not run.failures, run.failures
    said = [str(one.message) for one in told if "out of memory" in str(one.message)]
    return [record["measurements"] for record in Store(run.path).records()], said

mapped = lambda: 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (2**40, -1))  # a limit, and far away
attacked(2, sys.argv[2] + "/first")  # all is imported
ctypes.CDLL(None).malloc_trim(0)
resource.setrlimit(resource.RLIMIT_DATA, (mapped() + 130 * 10**6, -1))  # the largest map of 96 images takes 50 of it
short, told = attacked(96, sys.argv[2] + "/short")
resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
whole, nothing = attacked(96, sys.argv[2] + "/whole")
print(json.dumps([short == whole, told, nothing]))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about Linux's limits and glibc's allocator")
def test_where_memory_runs_out_smaller_batches_give_the_same_numbers(tmp_path: Path) -> None:
    """A real attack on a real network, in a process whose first batch does not fit: freed memory is to be had."""
    path, digits = tmp_path / "r18.safetensors", [str(number) for number in range(10)]
    save_model(make_model("resnet18", stem="cifar", width=32, img_size=64, classes=digits), path)
    command = [sys.executable, "-c", SHORT, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    same, told, nothing = json.loads(done.stdout)
    assert same
    assert not nothing
    sizes = [int(size) for line in told for size in re.findall(r"with (\d+) images", line)]
    assert sizes
    assert sizes == [96, 48, 24, 12][: len(sizes)]  # each said once; 48 fitted where this was written
