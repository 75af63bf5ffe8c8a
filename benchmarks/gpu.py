"""All that needs a GPU as one command: the tests on CUDA, the speed tables, the study's next jobs.

    python benchmarks/gpu.py --minutes 8 --out DIR --data-root ROOT --commit REV     # afterwards: merge.py DIR

For a machine with a GPU and no network: a plain checkout is enough, without .git (--commit then says the revision) and
without installing the package. Packages that are missing there travel as the wheels of gpu_wheels.txt:
    python -m pip install -q --no-index --no-deps --target /tmp/site WHEELS/*.whl && export PYTHONPATH=/tmp/site

Stages follow each other, each in a process of its own that is stopped at its time limit: ``tests`` (at most 90 s),
``speed`` (at most 150 s) and ``study`` (all that is left). A stage that fails or is stopped is told in a line, and the
next one starts. Results are written as they come: whatever stops the machine, what is in DIR counts. The same command
with the same DIR goes on: the study with its next jobs; tests and speed are done again unless --stages leaves them out.
DIR holds at most 8 files of at most 16 MiB: stages.jsonl (what ran on what), tests.txt, speed.jsonl, speed.txt,
kernels.txt, study.txt and study.tar (the study's store, weights and logs, packed each half minute from the folder
DIR.work beside DIR). Without a GPU the small form runs: it shows that everything runs, and says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "speed", "study")
MOST_FILES, MOST_BYTES = 8, 16 * 2**20
LIMITS = {"tests": 90.0, "speed": 150.0}  # seconds, where there are minutes enough
SHARES = {"tests": 1 / 4, "speed": 2 / 5}  # of all minutes at most, so that the study has its part of a short call
RESERVE = 15.0  # seconds that are kept to stop, pack and check
STUDY = ("-m", "coss_eval", "sweep", "co-claims", "--size", "gpu", "--device", "{device}", "--minutes", "{minutes}",
         "--out", "{work}/runs", "--work", "{work}/state")  # fmt: skip
SMALL_STUDY = ("-m", "coss_eval", "sweep", "crops-digits", *STUDY[6:])  # bundled images, some minutes
STORE = ROOT / "results" / "co-claims-gpu"  # what was merged before: the study goes on from there
PACK_EVERY = 30.0  # seconds
RUNS = "runs.zip"  # the store's finished runs: the others stand on its pilots, so it is packed first
LEAVE_OUT = ("*.lock", "lock", "*.tmp", "last.pt")  # of the tar


class Call(NamedTuple):
    """What the person asked for."""

    out: Path
    minutes: float
    stages: tuple[str, ...]
    data_root: str | None
    commit: str | None
    device: str


class Ended(NamedTuple):
    """How a stage's process ended."""

    code: int | None  # None: stopped at its limit
    seconds: float


def run_limited(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: dict[str, str],
    now_and_then: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a command in a session of its own, output to ``log``; its whole group is killed at the limit or on Ctrl-C.

    ``now_and_then`` is called every half minute while it runs.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = None
            while code is None and (left := seconds - (time.monotonic() - started)) > 0:
                code = _wait(process, min(left, PACK_EVERY))
                if code is None:
                    now_and_then()
        finally:
            _end_group(process)
    return Ended(code, time.monotonic() - started)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code, None where it still runs after so many seconds."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process's group, itself included, by the number that is its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # so that it can finish what it writes
        _wait(process, 3)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing is left of it
    finally:
        process.wait()


class Session:
    """One call: its clock, its stages, and the lines that stages.jsonl gets."""

    def __init__(self, call: Call) -> None:
        self.call, self.started = call, time.monotonic()
        self.small = call.device == "cpu"
        self.work = call.out.with_name(f"{call.out.name}.work")  # of the study: many files, so not in DIR
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if call.commit:
            self.environment["COSS_COMMIT"] = call.commit

    @property
    def left(self) -> float:
        """Seconds for stages."""
        return 60 * self.call.minutes - RESERVE - (time.monotonic() - self.started)

    def limit(self, stage: str) -> float:
        most = min(LIMITS.get(stage, self.left), SHARES.get(stage, 1.0) * 60 * self.call.minutes)
        return min(most, self.left)

    def note(self, **fields: Any) -> None:
        """A line of stages.jsonl, on the disk at once."""
        with (self.call.out / "stages.jsonl").open("a") as file:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def run(self) -> int:
        """All stages; how many failed."""
        failed = 0
        for stage in self.call.stages:
            limit = self.limit(stage)
            if limit < 5:
                ended, told = Ended(None, 0.0), "left out: no time is left for it"
            else:
                ended, told = self._stage(stage, limit)
            self.note(stage=stage, code=ended.code, seconds=round(ended.seconds, 1), limit=round(limit, 1), told=told)
            print(f"{stage}: {told}", flush=True)
            failed += ended.code != 0
        return failed

    def _stage(self, stage: str, limit: float) -> tuple[Ended, str]:
        log = self.call.out / f"{stage}.txt"
        command = [sys.executable, *self.arguments(stage, limit)]
        print(f"{stage}: at most {limit:.0f} s: {' '.join(command[1:])}", flush=True)
        if stage == "study":
            try:
                ended, packed = self._study(command, log, limit)
            except (ValueError, OSError, tarfile.TarError) as error:
                return Ended(1, 0.0), f"failed: what is there cannot be gone on with ({error}); give another --out"
        else:
            ended, packed = run_limited(command, log, limit, self.environment), ""
        how = {0: "done", None: f"stopped at its limit of {limit:.0f} s"}.get(ended.code, f"failed ({ended.code})")
        said = [counts(log) if stage == "tests" else last_line(log) if ended.code else "", packed]
        return ended, "; ".join([f"{how} in {ended.seconds:.0f} s", *filter(None, said)])

    def _study(self, command: Sequence[str], log: Path, limit: float) -> tuple[Ended, str]:
        archive = self.call.out / "study.tar"
        runs = self.work / "runs"
        if not runs.exists() and archive.exists():
            unpack(archive, runs)
        elif not runs.exists() and STORE.is_dir() and not self.small:
            shutil.copytree(STORE, runs)
        try:
            ended = run_limited(command, log, limit, self.environment, lambda: pack(runs, archive))
        finally:
            packed = pack(runs, archive)
        return ended, packed

    def arguments(self, stage: str, limit: float) -> list[str]:
        """What Python is started with."""
        call = self.call
        root = ("--data-root", call.data_root) if call.data_root else ()
        if stage == "tests":
            chosen = ("-k", "cpu or cuda") if self.small else ("-m", "cuda")
            return ["-m", "pytest", *chosen, "-q", "--tb=short", "-p", "no:cacheprovider", *files_on_cuda()]
        if stage == "speed":
            script = str(ROOT / "benchmarks" / "gpu_speed.py")
            seconds = f"{limit - 8:.0f}"
            return [script, "--out", str(call.out), "--seconds", seconds, "--device", call.device, *root]
        words = {"device": call.device, "minutes": f"{(limit - 5) / 60:.2f}", "work": str(self.work)}
        return [word.format(**words) for word in (SMALL_STUDY if self.small else STUDY)] + list(root)


def files_on_cuda() -> list[str]:
    """The test files that hold tests for a CUDA device: to collect all the others takes longer than to run these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if re.search(r"mark\.cuda|either_device", f.read_text())]


def last_line(log: Path) -> str:
    """The last line that a stage said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def counts(log: Path) -> str:
    """ "12 passed, 3 skipped" of a pytest log; its last line where it was stopped before."""
    last = last_line(log)
    found = re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)", last)
    return ", ".join(found) if found else last


def pack(folder: Path, target: Path) -> str:
    """The folder's files as one tar of at most 16 MiB, weights last, the newest first; what to tell of it."""
    if not folder.is_dir():
        return "it left nothing to pack"
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and not _left_out(path)]
    files.sort(key=lambda path: (path.suffix == ".safetensors", path.name != RUNS, -_changed(path), str(path)))
    temporary, size, kept = target.with_suffix(".tmp"), 10_240, 0
    with tarfile.open(temporary, "w") as tar:
        for path in files:
            try:
                taken = 1536 + path.stat().st_size  # a header, a long name, padding
                if size + taken <= MOST_BYTES:
                    tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
                    size, kept = size + taken, kept + 1
            except FileNotFoundError:  # renamed or removed since it was listed
                kept += 1
    os.replace(temporary, target)
    if kept == len(files):
        return f"{kept} files in {target.name}"
    return f"only {kept} of {len(files)} files fit into {target.name}; the rest is in {folder}"


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _left_out(path: Path) -> bool:
    return any(path.match(pattern) for pattern in LEAVE_OUT)


def unpack(archive: Path, folder: Path, *, most_files: int = 5_000, most_bytes: int = 8 * MOST_BYTES) -> None:
    """The regular files of a tar into ``folder``. ValueError for links, paths that lead out, and too much of it."""
    if not archive.exists():
        return
    size = 0
    with tarfile.open(archive, "r:") as tar:
        for number, member in enumerate(tar, 1):
            size += member.size
            if not (member.isreg() or member.isdir()) or not _inside(member.name):
                raise ValueError(f"{archive} holds {member.name!r}, which is no plain file inside it; nothing is taken")
            if number > most_files or size > most_bytes:
                raise ValueError(f"{archive} holds more than {most_files} files or {most_bytes >> 20} MiB")
            if member.isreg():
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and name not in ("", ".")


def trim(out: Path) -> list[str]:
    """At most 8 files of 16 MiB in ``out``: logs lose their beginning, others are named; the lines to tell."""
    lines = []
    files = sorted(path for path in out.rglob("*") if path.is_file())
    for path in files:
        if path.stat().st_size > MOST_BYTES and path.suffix in (".txt", ".jsonl"):
            end = path.read_bytes()[-MOST_BYTES // 2 :]
            path.write_bytes(end[end.find(b"\n") + 1 :])
            lines.append(f"{path.name} was cut to its last 8 MiB")
        elif path.stat().st_size > MOST_BYTES:
            lines.append(f"{path.name} is over 16 MiB: split it before it travels")
    if len(files) > MOST_FILES:
        lines.append(f"{out} holds {len(files)} files, over {MOST_FILES}: remove what is not of this command")
    return lines


def provenance(call: Call) -> dict[str, Any]:
    """What is run on what, as stages.jsonl's first line of a call has it."""
    import torch

    from coss_eval.runtime.provenance import git_commit, made_with

    return {"git_commit": git_commit(), "minutes": call.minutes, **made_with(torch.device(call.device))}


def resolved(device: str) -> str:
    from coss_eval.runtime.device import resolve_device

    return resolve_device(device).type


def parsed(words: Sequence[str] | None) -> Call:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True, help="the folder that comes back")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas")
    parser.add_argument("--data-root", help="where tiny-imagenet-50 and the like lie")
    parser.add_argument("--commit", help="the revision of the code, where there is no .git")
    parser.add_argument("--device", default="auto")
    found = parser.parse_args(words)
    stages = tuple(filter(None, found.stages.split(",")))
    if not stages or set(stages) - set(STAGES):
        parser.error(f"--stages takes some of {', '.join(STAGES)}, got {found.stages!r}")
    if not 0 < found.minutes <= 24 * 60:
        parser.error(f"--minutes must be above 0 and at most a day, got {found.minutes:g}")
    if found.commit and not re.fullmatch(r"[\w.+-]{1,64}", found.commit):
        parser.error(f"--commit takes a revision, got {found.commit!r}")
    if found.data_root and not Path(found.data_root).is_dir():
        parser.error(f"--data-root {found.data_root} is no folder")
    root = str(Path(found.data_root).resolve()) if found.data_root else None
    return Call(found.out.resolve(), found.minutes, stages, root, found.commit, found.device)


def main(words: Sequence[str] | None = None) -> int:
    call = parsed(words)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if call.commit:
        os.environ["COSS_COMMIT"] = call.commit
    from coss_eval.errors import CossError

    try:
        call = call._replace(device=resolved(call.device))
        call.out.mkdir(parents=True, exist_ok=True)
        session = Session(call)
        session.note(**provenance(call))
    except (CossError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage's process does not outlive this one
    if session.small:
        print("no GPU: the small form, which shows that everything runs; its numbers say nothing of a GPU", flush=True)
    failed = session.run()
    for line in trim(call.out):
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
