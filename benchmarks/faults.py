"""What happens when things break while it runs: kills, full disks, damaged files, several processes on one store.

    python benchmarks/faults.py [--kills 30] [--out faults.md]

Each line of the table is one case: commands run as a person runs them, in a folder of its own, and what is stored
afterwards is compared with what an undisturbed run stores. About ten minutes on two cores; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coss_eval.runtime.disk import cache_folder
from coss_eval.store import Store

CELLS = ("--ckpt", "pixels:8", "--data", "digits", "--limit", "60", "--quiet")
ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A case, what was done to it, and what came of it."""

    case: str
    done: str
    came: str
    good: bool


def started(words: tuple[str, ...], full_at: int | None = None, **environment: str | None) -> subprocess.Popen[str]:
    """coss-eval as a process; ``full_at``: no file of it may become larger than so many bytes, as on a full disk."""
    own = {name: value for name, value in (os.environ | environment).items() if value is not None}
    own["PYTHONPATH"] = str(ROOT)

    def limit() -> None:
        if full_at is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))

    command = [sys.executable, "-m", "coss_eval", *words]
    return subprocess.Popen(
        command, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit
    )


def said(words: tuple[str, ...], **how: Any) -> tuple[int, str]:
    process = started(words, **how)
    text = process.communicate(timeout=900)[0]
    return process.returncode, text


def evaluation(out: Path) -> tuple[str, ...]:
    return ("corruptions", *CELLS, "--out", str(out))


def training(out: Path) -> tuple[str, ...]:
    steps = ("--epochs", "6", "--batch-size", "64", "--set", "width=8")
    return ("train", "--method", "simclr", "--preset", "digits-tiny", *steps, "--out", str(out), "--resume")


def numbers(out: Path) -> dict[str, Any]:
    """All that is measured, by key."""
    return {record["key"]: record["measurements"] for record in Store(out).records()}


def left_behind(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if path.suffix in (".tmp", ".lock")]


def killed(words: tuple[str, ...], kills: int, number: int) -> int:
    """Start it again and again, killed at random moments, until one run ends by itself; how often it was killed."""
    seeded, undisturbed = random.Random(0), 30.0
    for kill in range(kills):
        process = started(words)
        try:
            process.communicate(timeout=seeded.uniform(1.0, undisturbed))
            return kill
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.communicate()
    return kills


def kill_evaluate(at: Path, kills: int) -> Row:
    times = killed(evaluation(at / "out"), kills, signal.SIGKILL)
    code, _ = said(evaluation(at / "out"))
    said(evaluation(at / "whole"))
    same = numbers(at / "out") == numbers(at / "whole") and not left_behind(at / "out")
    return Row("kill -9 of evaluate", f"{times} kills", f"exit {code}, same numbers: {same}", code == 0 and same)


def kill_train(at: Path, kills: int) -> Row:
    times = killed(training(at / "out"), kills, signal.SIGKILL)
    code, _ = said(training(at / "out"))
    said(training(at / "whole"))
    files = [(at / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    same = files[0] == files[1]
    return Row("kill -9 of train", f"{times} kills", f"exit {code}, same bytes: {same}", code == 0 and same)


def terminate(at: Path) -> Row:
    process = started(evaluation(at / "out"))
    while not list((at / "out" / "cells").glob("*.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    kept = len(Store(at / "out").records())
    code, _ = said(evaluation(at / "out"))
    good = process.returncode == 143 and kept > 0 and "goes on from there" in text and code == 0
    return Row("SIGTERM to evaluate", "after the first cell", f"exit {process.returncode}, {kept} cells kept", good)


def full_disk(at: Path) -> Row:
    code, text = said(evaluation(at / "out"), full_at=2000)
    line = next((line for line in text.splitlines() if "File too large" in line), "")
    return Row("full disk", "files of at most 2 kB", f"exit {code}: {line[:150]}", code == 1 and bool(line))


def read_only(at: Path) -> Row:
    code, text = said(evaluation(Path("/proc/results")))
    return Row(
        "read-only store", "--out in /proc", f"exit {code}: {text.strip()[-120:]}", code == 1 and "--out" in text
    )


def no_home(at: Path) -> Row:
    code, _ = said(evaluation(at / "out"), HOME="/proc/nobody", COSS_CACHE_DIR=None, XDG_CACHE_HOME=None)
    return Row("home that cannot be written", "HOME=/proc/nobody", f"exit {code}", code == 0)


def four_processes(at: Path) -> Row:
    together = [started(evaluation(at / "out")) for _ in range(4)]
    for process in together:
        process.communicate()
    code, _ = said(evaluation(at / "out"))
    said(evaluation(at / "whole"))
    same = numbers(at / "out") == numbers(at / "whole")
    return Row("four processes on one store", "at once", f"exit {code}, same numbers: {same}", code == 0 and same)


def damaged(name: str, pattern: str) -> Callable[[Path], Row]:
    """A case that overwrites a finished run's file with junk."""

    def case(at: Path) -> Row:
        said(evaluation(at / "out"))
        before = numbers(at / "out")
        folder = cache_folder() if name == "cache" else at / "out"
        for path in folder.glob(pattern):
            path.write_bytes(b'{"junk')
        code, _ = said(evaluation(at / "out"))
        same = numbers(at / "out") == before
        return Row(f"damaged {name}", pattern, f"exit {code}, same numbers: {same}", code == 0 and same)

    return case


def stale_lock(at: Path) -> Row:
    (at / "out" / "cells").mkdir(parents=True)
    (at / "out" / "run.lock").write_text("1 elsewhere\n")
    (at / "out" / "cells" / "0123.lock").write_bytes(os.urandom(64))
    code, _ = said(evaluation(at / "out"))
    return Row("locks that nobody holds", "run.lock, a cell's", f"exit {code}", code == 0)


def clock_set_back(at: Path) -> Row:
    said(evaluation(at / "out"))
    before = numbers(at / "out")
    for path in (at / "out").rglob("*"):
        os.utime(path, (2**31, 2**31))
    code, _ = said(evaluation(at / "out"))
    same = numbers(at / "out") == before
    return Row("clock set back", "files from 2038", f"exit {code}, same numbers: {same}", code == 0 and same)


def moved(at: Path) -> Row:
    said(evaluation(at / "out"))
    before = numbers(at / "out")
    shutil.move(at / "out", at / "elsewhere")
    code, text = said(tuple(word for word in evaluation(at / "elsewhere") if word != "--quiet"))
    same = numbers(at / "elsewhere") == before and "0 to compute" in text
    return Row("store moved", "to another folder", f"exit {code}, nothing computed again: {same}", code == 0 and same)


CASES: dict[str, Callable[[Path], Row]] = {
    "terminate": terminate,
    "full-disk": full_disk,
    "read-only": read_only,
    "no-home": no_home,
    "four": four_processes,
    "damaged-cells": damaged("cells", "cells.jsonl.gz"),
    "damaged-run": damaged("run.json", "run.json"),
    "damaged-samples": damaged("samples", "samples-*.npz"),
    "damaged-cache": damaged("cache", "*.npz"),
    "locks": stale_lock,
    "clock": clock_set_back,
    "moved": moved,
}


def main() -> None:
    """Run all cases, or those named, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of: kills, {', '.join(CASES)} [default: all]")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        if name in given.cases or not given.cases:
            with tempfile.TemporaryDirectory() as at:
                rows.append(case(Path(at)))
                print(json.dumps(rows[-1]), flush=True)
    if "kills" in given.cases or not given.cases:
        for kill in (kill_evaluate, kill_train):
            with tempfile.TemporaryDirectory() as at:
                rows.append(kill(Path(at), given.kills))
                print(json.dumps(rows[-1]), flush=True)
    lines = ["| case | what was done | what came of it | good |", "|---|---|---|---|"]
    lines += [f"| {row.case} | {row.done} | {row.came} | {'yes' if row.good else 'NO'} |" for row in rows]
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
