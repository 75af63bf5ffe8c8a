"""What gpu.py brought back, put into results/: the speed tables into results/gpu, the study's runs into its store.

    python benchmarks/merge.py DIR

Twice is once: a row takes the place of the older one of the same measurement on the same device, a run that is there
already stays. Rows of the small form (a machine without a GPU) are left out. Runs of another configuration, size or
list than the study's are refused in one line, and nothing of them is taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu import ROOT, STORE, unpack

from coss_eval.errors import CossError, UsageError
from coss_eval.runtime.disk import write_atomically
from coss_eval.store.runs import Runs
from coss_eval.sweeps import plan
from coss_eval.sweeps.packing import pack_runs
from coss_eval.sweeps.state import EPOCHS, State, states

STAGES = ("missing", "waits", "begun", "trained", "done")  # how far a run is, from the least
HEADER = """# Measured on a GPU

Made by `benchmarks/gpu.py`, put here by `benchmarks/merge.py`; speed.jsonl has all fields, kernels.txt the kernels that
take longest in a training step. In brackets: the lowest and highest turn. Goals that are met have a check mark.
"""
Row = dict[str, Any]


def lines_of(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; one that a killed process cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line that was cut short is left out")
    return [row for row in rows if isinstance(row, dict)]


def identity(row: Row) -> tuple[str, str]:
    return row["what"], row["device"]


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """One row a measurement and device, the later one, by device and in the order of the newest call."""
    rows = {identity(row): row for row in old}
    for row in new:
        if "error" not in row or "error" in rows.get(identity(row), row):
            rows.pop(identity(row), None)
            rows[identity(row)] = row
    return sorted(rows.values(), key=lambda row: row["device"])


def markdown(rows: Sequence[Row]) -> str:
    """A table for each device."""
    parts = [HEADER]
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        parts += [f"## {device}\n", f"torch {', '.join(sorted({row['torch'] for row in mine}))}\n"]
        parts.append("| what | value | against | ratio | goal | precision, batch | GPU memory at its peak | commit |")
        parts.append("|:--|--:|:--|--:|:--|:--|--:|:--|")
        parts += [table_line(row) for row in mine]
        parts.append("")
    return "\n".join(parts)


def table_line(row: Row) -> str:
    if "error" in row:
        return f"| {row['what']} | - | {row['error'].replace('|', '/')} | | | | | {_commit(row)} |"
    spread = f" [{row['low']:,.4g}, {row['high']:,.4g}]" if "low" in row else ""
    ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3g}"
    goal = "" if row.get("goal") is None else f"{row['goal']} {'✓' if row['met'] else '✗ missed'}"
    value = f"{row['value']:,.4g} {row['unit']}{spread}"
    cells = (row["what"], value, row.get("against", ""), ratio, goal, f"{row['precision']}, {row['batch']}")
    return f"| {' | '.join(cells)} | {row['peak_gib']} GiB | {_commit(row)} |"


def _commit(row: Row) -> str:
    return (row["commit"] or "unknown")[:7]


def merge_tables(came: Path, target: Path) -> list[str]:
    """speed.jsonl, README.md and the kernels' table under ``target``; what to tell."""
    found = lines_of(came / "speed.jsonl")
    rows = [row for row in found if not row["small_form"]]
    told = [f"speed: {len(rows)} rows"]
    if len(rows) < len(found):
        told.append(f"speed: {len(found) - len(rows)} rows of the small form are left out")
    if rows:
        target.mkdir(parents=True, exist_ok=True)
        everything = merged(lines_of(target / "speed.jsonl"), rows)
        write_atomically(target / "speed.jsonl", "".join(f"{json.dumps(row)}\n" for row in everything).encode())
        write_atomically(target / "README.md", markdown(everything).encode())
        if (came / "kernels.txt").exists():
            texts = [
                (folder / "kernels.txt").read_text() for folder in (target, came) if (folder / "kernels.txt").exists()
            ]
            write_atomically(target / "kernels.txt", "".join(kernel_tables(texts).values()).encode())
    return told


def kernel_tables(texts: Iterable[str]) -> dict[str, str]:
    """The tables of kernels.txt by what was trained: of each the last one."""
    tables: dict[str, str] = {}
    for text in texts:
        title = ""
        for line in text.splitlines(keepends=True):
            head, found, _ = line.partition(": a step takes ")
            if found:
                title = head
                tables.pop(title, None)
            tables[title] = tables.get(title, "") + line
    return tables


def merge_study(archive: Path, store: Path, sweep: plan.Sweep) -> list[str]:
    """The runs of study.tar that are further than the store's, into it; what to tell. Raises CossError."""
    with tempfile.TemporaryDirectory() as folder:
        came = Path(folder)
        try:
            unpack(archive, came)
        except (ValueError, OSError, tarfile.TarError) as error:
            raise CossError(f"{archive} cannot be unpacked: {error}") from error
        _refuse_other_epochs(came, store)
        theirs = {state.run.name: state for state in states(sweep, came, came)}  # refuses other configurations
        packed = Runs(came)
        folders = set(packed.names())
        if unknown := sorted(folders - set(theirs)):
            raise UsageError(
                f"{archive} holds runs that {sweep.name} has not ({', '.join(unknown[:3])}); nothing is taken"
            )
        if (came / EPOCHS).exists() and not (store / EPOCHS).exists():
            store.mkdir(parents=True, exist_ok=True)
            write_atomically(store / EPOCHS, (came / EPOCHS).read_bytes())
        here = {state.run.name: state for state in states(sweep, store, store)}
        taken = [name for name, state in theirs.items() if _further(state, here.get(name))]
        for name in taken:
            packed.unpack(name)
            _replace(came / name, store / name)
    return [f"study: {len(taken)} runs taken, {len(folders) - len(taken)} there already or not trained"]


def packed_lines(store: Path) -> list[str]:
    """Pack the store's finished runs; what to tell."""
    left = {name: reason for name, reason in pack_runs(store).items() if reason is not None}
    return [f"study: {name} stays a folder: {reason}" for name, reason in left.items()]


def _refuse_other_epochs(came: Path, store: Path) -> None:
    files = [folder / EPOCHS for folder in (came, store)]
    if all(path.exists() for path in files):
        epochs = [json.loads(path.read_bytes()).get("epochs") for path in files]
        if epochs[0] != epochs[1]:
            raise UsageError(f"those runs have {epochs[0]} epochs and {store}'s {epochs[1]}; nothing is taken")


def _further(state: State, here: State | None) -> bool:
    stage = STAGES.index(state.stage)
    return stage >= STAGES.index("trained") and (here is None or stage > STAGES.index(here.stage))


def _replace(source: Path, target: Path) -> None:
    """The folder in the place of the target, which is there or not, never half of it."""
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, new)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("came", type=Path, metavar="DIR", help="what gpu.py wrote")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args(words)
    if not arguments.came.is_dir():
        parser.error(f"{arguments.came} is no folder")
    failed = 0
    print("\n".join(merge_tables(arguments.came, arguments.results / "gpu")))
    archive = arguments.came / "study.tar"
    if archive.exists():
        try:
            store = arguments.results / STORE.name
            print("\n".join(merge_study(archive, store, plan.read_sweep("co-claims", "gpu"))))
            print("\n".join(packed_lines(store)))
        except CossError as error:
            print(f"study: {error}", file=sys.stderr)
            failed = 1
        else:
            print("its page: coss-eval sweep co-claims --size gpu --out results/co-claims-gpu --list")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
