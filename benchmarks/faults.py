"""What happens when things break while it runs, and what files from strangers cost.

    python benchmarks/faults.py [CASE ...] [--kills 30] [--out faults.md]
    python benchmarks/faults.py --hostile [--seconds 20] [--out hostile.md]

Each line of the first table is one case: commands run as a person runs them, in a folder of its own, and what is stored
afterwards is compared with what an undisturbed run stores: numbers, verdicts by image, each cell once, no leftovers.
The second runs the corpus of tests/test_hostile.py, each file in a process of its own with 2 GiB beyond its imports.
About ten minutes each on two cores; Linux.
"""

from __future__ import annotations

import argparse
import ctypes
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
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coss_eval.store import Store

NAMES = ("fog", "contrast", "brightness", "pixelate", "jpeg_compression")
CELLS = ("--ckpt", "pixels:8", "--data", "digits", "--limit", "60", "--device", "cpu")
ROOT = Path(__file__).parents[1]
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # linux/capability.h, linux/prctl.h


class Row(NamedTuple):
    """A case, what was done to it, and what came of it."""

    case: str
    done: str
    came: str
    good: bool


def started(
    words: tuple[str, ...], full_at: int | None = None, cwd: Path | None = None, **environment: str | None
) -> subprocess.Popen[str]:
    """coss-eval as a process that obeys file modes, root's too, with a cache beside its results.

    ``full_at``: no file of it may become larger than so many bytes, as on a full disk.
    """
    own = {name: value for name, value in (os.environ | environment).items() if value is not None}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))

    def limit() -> None:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)  # fails, and is not needed, but for root
        if full_at is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, full_at))

    command = [sys.executable, "-m", "coss_eval", *words]
    return subprocess.Popen(
        command, env=own, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=limit
    )


def said(words: tuple[str, ...], **how: Any) -> tuple[int, str]:
    """Exit code and all that was printed."""
    process = started(words, **how)
    text = process.communicate(timeout=1800)[0]
    return process.returncode, text


def line_with(text: str, *words: str) -> str:
    """The first line that has all of the words; "" where none has."""
    return next((line.strip()[:170] for line in text.splitlines() if all(word in line for word in words)), "")


def evaluation(out: Path, *names: str) -> tuple[str, ...]:
    return ("corruptions", *CELLS, "--names", *(names or NAMES), "--out", str(out))


def training(out: Path) -> tuple[str, ...]:
    steps = ("--epochs", "6", "--batch-size", "64", "--set", "width=8")
    return ("train", "--method", "simclr", "--preset", "digits-tiny", *steps, "--out", str(out), "--resume")


def finished() -> Path:
    """A folder with what an undisturbed run stores ("out") and its cache ("cache"); made once a process."""
    global _FINISHED
    if _FINISHED is None:
        _FINISHED = tempfile.TemporaryDirectory()
        whole = Path(_FINISHED.name)
        code, text = said(evaluation(whole / "out"), COSS_CACHE_DIR=str(whole / "cache"))
        assert code == 0, text
    return Path(_FINISHED.name)


_FINISHED: tempfile.TemporaryDirectory[str] | None = None


def copied(at: Path) -> Path:
    """A copy of the undisturbed run's folder, and its cache beside it."""
    shutil.copytree(finished(), at, dirs_exist_ok=True)
    return at / "out"


def kept(out: Path) -> dict[str, Any]:
    """Measurements and verdicts by image of all cells, by key."""
    store = Store(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs themselves are to name what is damaged
        found = {record["key"]: (record["measurements"], store.samples(record["key"])) for record in store.records()}
    return {key: (m, None if table is None else table.to_csv()) for key, (m, table) in found.items()}


def differences(out: Path) -> str:
    """How what is stored differs from an undisturbed run's, in words; "" where it does not."""
    mine, whole = kept(out), kept(finished() / "out")
    wrong = sum(mine[key] != whole.get(key) for key in mine)
    left = [path.name for path in out.rglob("*") if path.suffix in (".tmp", ".lock")]
    told = [f"{len(whole.keys() - mine.keys())} cells lost"] if whole.keys() - mine.keys() else []
    told += [f"{wrong} cells differ"] if wrong else []
    told += [f"left behind: {left}"] if left else []
    return "; ".join(told)


def verdict(case: str, done: str, out: Path, came: str, *, good: bool = True) -> Row:
    """A row: what came, and whether all that is stored is an undisturbed run's."""
    other = differences(out)
    return Row(
        case, done, f"{came}; {other or 'the same numbers and verdicts, nothing left behind'}", good and not other
    )


def begun(out: Path) -> subprocess.Popen[str]:
    """A run that has stored its first cell."""
    process = started(evaluation(out))
    while not list((out / "cells").glob("*.json")) and process.poll() is None:
        time.sleep(0.02)
    return process


def undisturbed(words: tuple[str, ...]) -> float:
    """Run it to its end; the seconds that took."""
    begin = time.monotonic()
    code, text = said(words)
    assert code == 0, text
    return time.monotonic() - begin


def killed(words: Callable[[Path], tuple[str, ...]], at: Path, kills: int, seconds: float) -> tuple[list[Path], int]:
    """Kill -9 it at random moments of the seconds it takes, going on each time, in a new folder after each run that
    ended by itself; the folders, each with a run that has ended, and how many kills came after something was stored."""
    seeded, outs, told, late = random.Random(0), [at / "out0"], 0, 0
    while told < kills:
        process = started(words(outs[-1]))
        try:
            text = process.communicate(timeout=seeded.uniform(1.0, seconds))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            told += 1
            late += any(path.is_file() for path in outs[-1].rglob("*"))
        else:
            assert process.returncode == 0, text
            outs.append(at / f"out{len(outs)}")
    code, text = said(words(outs[-1]))
    assert code == 0, text
    return outs, late


def kill_evaluate(at: Path, kills: int) -> Row:
    finished()
    outs, late = killed(evaluation, at, kills, undisturbed(evaluation(at / "whole")))
    other = "; ".join(filter(None, map(differences, outs)))
    done = f"{kills} kills over {len(outs)} runs, {late} of them after files were stored"
    came = other or "all runs end with exit 0, the same numbers and verdicts, nothing left behind"
    return Row("kill -9 of evaluate", done, came, not other)


def kill_train(at: Path, kills: int) -> Row:
    outs, late = killed(training, at, kills, undisturbed(training(at / "whole")))
    weights = (at / "whole" / "model.safetensors").read_bytes()
    same = sum((out / "model.safetensors").read_bytes() == weights for out in outs)
    done = f"{kills} kills over {len(outs)} runs, {late} of them after files were stored"
    came = f"all runs end with exit 0; {same} of {len(outs)} have the bytes of an undisturbed run's weights"
    return Row("kill -9 of train", done, came, same == len(outs))


def terminate(at: Path) -> Row:
    process = begun(at / "out")
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    cells = len(Store(at / "out").records())
    code, _ = said(evaluation(at / "out"))
    good = process.returncode == 143 and cells > 0 and "goes on from there" in text and code == 0
    came = f"exit {process.returncode}, {cells} cells kept; then exit {code}"
    return verdict("SIGTERM to evaluate", "after the first cell", at / "out", came, good=good)


def full_disk(at: Path) -> Row:
    code, text = said(evaluation(at / "out"), full_at=2000)
    line = line_with(text, "File too large")
    again, _ = said(evaluation(at / "out"))
    came = f"exit {code}: {line}; with room again, exit {again}"
    good = (code, again) == (1, 0) and "make room" in text
    return verdict("full disk", "files of at most 2 kB", at / "out", came, good=good)


def read_only(at: Path) -> Row:
    out = copied(at)
    for path in [*out.rglob("*"), out]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    code, text = said((*evaluation(out), "--overwrite"))
    same = before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    out.chmod(0o755)
    came = f"exit {code}: {line_with(text, 'cannot write')}"
    return verdict("read-only store", "--overwrite into it", out, came, good=code == 1 and same and "--out" in text)


def homeless(case: str, done: str, home: Callable[[Path], str | None]) -> Callable[[Path], Row]:
    """A case without a folder for caches: it costs a line, not the run."""

    def run(at: Path) -> Row:
        nowhere = {"COSS_CACHE_DIR": None, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
        code, text = said(evaluation(at / "out"), HOME=home(at), **nowhere)
        line = line_with(text, "cache")
        return verdict(case, done, at / "out", f"exit {code}; {line or 'no word of it'}", good=code == 0)

    return run


def read_only_home(at: Path) -> str:
    (at / "home").mkdir()
    (at / "home").chmod(0o555)
    return str(at / "home")


def four_processes(at: Path) -> Row:
    together = [started(evaluation(at / "out")) for _ in range(4)]
    texts = [process.communicate()[0] for process in together]
    stored = len(Store(at / "out").records())
    code, _ = said(evaluation(at / "out"))
    crashed = sum("Traceback" in text for text in texts)
    came = f"{crashed} tracebacks, {stored} cells stored by the four; then exit {code}"
    return verdict("four processes on one store", "at once", at / "out", came, good=code == 0 and not crashed)


def damaged(name: str, pattern: str, named: str) -> Callable[[Path], Row]:
    """A case that overwrites a finished run's files with junk: they are named, by a line with ``named``.

    Those of its cache meet a run that has nothing stored, else they would not be read.
    """

    def case(at: Path) -> Row:
        out = copied(at)
        if name == "cache":
            shutil.rmtree(out)
        for path in (at if name == "cache" else out).glob(pattern):
            path.write_bytes(b'{"junk')
        code, text = said(evaluation(out), COSS_CACHE_DIR=str(at / "cache"))
        line = line_with(text, named)
        came = f"exit {code}; {line or 'not named'}"
        return verdict(f"damaged {name}", pattern, out, came, good=code == 0 and bool(line))

    return case


def damaged_loose(at: Path) -> Row:
    """The files of a run that was killed: a cell, and the samples of others."""
    out = at / "out"
    process = begun(out)
    while len(list((out / "cells").glob("*.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    cell, *others = sorted((out / "cells").glob("*.json"))
    cell.write_bytes(cell.read_bytes()[:100])
    for other in others:
        (out / "samples" / f"{other.stem}.parquet").write_bytes(b"junk")
    code, text = said(evaluation(out))
    lines = [line_with(text, cell.name), line_with(text, ".parquet")]
    aside = list(out.rglob("*.damaged"))
    good = code == 0 and all(lines) and len(aside) == 1
    return verdict(
        "damaged loose cell and samples", "of a killed run", out, f"exit {code}; {lines[0]}; kept aside", good=good
    )


def stale_locks(at: Path) -> Row:
    out = copied(at)
    (out / "cells").mkdir()
    (out / "run.lock").write_text("1 elsewhere\n")
    (out / "cells" / f"{Store(out).records()[0]['key']}.lock").write_bytes(os.urandom(64))
    code, _ = said((*evaluation(out), "--overwrite"))
    return verdict("locks that nobody holds", "run.lock, a cell's, junk in them", out, f"exit {code}", good=code == 0)


BACKWARDS = """
import time
first, now = time.time(), time.time
time.time = lambda: 1e9 - (now() - first)  # 2001, and a second less each second
time.time_ns = lambda: int(time.time() * 1e9)
"""


def clock_set_back(at: Path) -> Row:
    """A killed run goes on under a clock of 2001 that runs backwards, on files of 2038."""
    out = at / "out"
    process = begun(out)
    process.kill()
    process.communicate()
    for path in out.rglob("*"):
        os.utime(path, (2**31 - 1, 2**31 - 1))
    (at / "clock").mkdir()
    (at / "clock" / "sitecustomize.py").write_text(BACKWARDS)
    code, _ = said(evaluation(out), PYTHONPATH=str(at / "clock"))
    done = "kill -9, then files of 2038 and a clock of 2001 that runs backwards"
    return verdict("clock set back", done, out, f"exit {code}", good=code == 0)


def moved(at: Path) -> Row:
    shutil.move(copied(at), at / "elsewhere")
    code, text = said(evaluation(at / "elsewhere"))
    good = code == 0 and "0 to compute" in text
    came = f"exit {code}: {line_with(text, 'to compute')}"
    return verdict("store moved", "to another folder", at / "elsewhere", came, good=good)


def moved_meanwhile(at: Path) -> Row:
    """What was stored before goes along; what comes after lies in a new folder at the old place."""
    process = begun(at / "out")
    shutil.move(at / "out", at / "elsewhere")
    text = process.communicate()[0]
    there, here = kept(at / "elsewhere"), kept(at / "out")
    code, _ = said(evaluation(at / "out"))
    twice = len(there.keys() & here.keys())
    came = (
        f"exit {process.returncode}, {len(there)} cells there and {len(here)} here, {twice} in both; then exit {code}"
    )
    whole = kept(finished() / "out")
    good = "Traceback" not in text and code == 0 and not twice and all(whole[key] == there[key] for key in there)
    return verdict("store moved while it was written", "after the first cell", at / "out", came, good=good)


BROKEN = """
def broken(images, setting, draws):
    raise RuntimeError("out of order")
"""


def failing_cell(at: Path) -> Row:
    (at / "ours.py").write_text(BROKEN)
    code, text = said(evaluation(at / "out", "fog", "ours:broken", "contrast"), cwd=at)
    stored, whole = kept(at / "out"), kept(finished() / "out")
    same = sum(stored[key] == whole.get(key) for key in stored)
    came = f"exit {code}: {line_with(text, 'out of order')}; {same} other cells stored, the same numbers"
    return Row("a cell that fails", "a corruption of one's own raises", came, code == 1 and same == len(stored) == 3)


def failing_model(at: Path) -> Row:
    """A network whose variances are negative, beside the one of the undisturbed run."""
    from coss_eval.checkpoints.load import make_model, save_model

    model = make_model("resnet18", stem="cifar", width=4)
    for name, buffer in model.backbone.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(-1.0)
    save_model(model, at / "broken.safetensors")
    code, text = said((*evaluation(at / "out"), "--ckpt", str(at / "broken.safetensors")))
    came = f"exit {code}: {line_with(text, 'NaN', 'broken')}"
    return verdict("a model that fails", "beside one that does not", at / "out", came, good=code == 1 and "NaN" in text)


CASES: dict[str, Callable[[Path], Row]] = {
    "terminate": terminate,
    "full-disk": full_disk,
    "read-only": read_only,
    "no-home": homeless("no home", "HOME not set", lambda at: None),
    "missing-home": homeless("home that does not exist", "HOME=/proc/nobody", lambda at: "/proc/nobody"),
    "read-only-home": homeless("read-only home", "mode 555", read_only_home),
    "four": four_processes,
    "damaged-cells": damaged("cells", "cells.jsonl.gz", "cells.jsonl.gz"),
    "damaged-run": damaged("run.json", "run.json", "run.json"),
    "damaged-samples": damaged("samples", "samples-*.npz", "samples-"),
    "damaged-cache": damaged("cache", "cache/**/*.*", "cache"),
    "loose": damaged_loose,
    "locks": stale_locks,
    "clock": clock_set_back,
    "moved": moved,
    "moved-meanwhile": moved_meanwhile,
    "failing-cell": failing_cell,
    "failing-model": failing_model,
}


def tabled(rows: list[tuple[str, ...]], *names: str) -> str:
    """A table in Markdown."""
    lines = [" | ".join(names), "|".join("---" for _ in names), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line.replace(chr(10), ' ')} |\n" for line in lines)


def faults(cases: list[str], kills: int) -> tuple[str, bool]:
    """The table of the cases named, or of all, and whether all are good."""
    rows: list[Row] = []
    also = {"kill-evaluate": kill_evaluate, "kill-train": kill_train}
    todo = {**CASES, **{name: lambda at, run=run: run(at, kills) for name, run in also.items()}}
    for name in cases or todo:
        with tempfile.TemporaryDirectory() as at:
            try:
                rows.append(todo[name](Path(at)))
            except Exception as error:  # noqa: BLE001 - what a case could not cope with is a row, too
                rows.append(Row(name, "", f"the case itself failed: {type(error).__name__}: {error}", False))
            print(json.dumps(rows[-1]), flush=True)
    cells = [(row.case, row.done, row.came.replace("|", "/"), "yes" if row.good else "NO") for row in rows]
    return tabled(cells, "case", "what was done", "what came of it", "good"), all(row.good for row in rows)


def hostile(seconds: float) -> tuple[str, bool]:
    """The table of the hostile corpus, and whether each file cost one line, in bounded memory."""
    sys.path.insert(0, str(ROOT / "tests"))
    import multiprocessing

    import test_hostile as corpus

    multiprocessing.set_forkserver_preload(corpus.PRELOADED)
    server = corpus.PROCESSES.Process(target=int)  # its imports are no file's seconds
    server.start()
    server.join()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as at:
        corpus.finished_run(Path(at) / "run")
        for name, case in corpus.CASES.items():
            folder = Path(at) / name
            folder.mkdir()
            if case.action == "stored":
                shutil.copytree(Path(at) / "run", folder / "run")
            told, memory, took = corpus.outcome(name, folder, seconds)
            wrong = corpus.complaint(name, told, memory)
            good &= wrong is None
            came = " ".join(told.replace(str(folder), ".").replace("|", "/").split())
            what = {"model": "opened as a checkpoint", "data": "opened as images"}.get(
                case.action, "given to a command"
            )
            row = (name.replace("_", " "), what, came[:140], f"{memory / 2**20:.0f}", f"{took:.1f}")
            rows.append((*row, "yes" if wrong is None else "NO"))
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(folder)
    return tabled(rows, "file", "what was done", "what came", "peak MiB more", "s", "good"), good


def main() -> None:
    """Run all cases, or those named, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of: {', '.join(CASES)}, kill-evaluate, kill-train [default: all]")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--hostile", action="store_true", help="the corpus of tests/test_hostile.py instead")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a hostile file may take")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    table, good = hostile(given.seconds) if given.hostile else faults(given.cases, given.kills)
    if given.out is not None:
        given.out.write_text(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
