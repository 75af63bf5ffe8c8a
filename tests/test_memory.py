"""Freed memory is kept for the next tensors, but where a person has set the allocator up."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from coss_eval.runtime.processes import process_group
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
