"""Finished runs, of a sweep or of training alone, put into the one file of their folder; loads no torch."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from pathlib import Path

from coss_eval.store import Store
from coss_eval.store.runs import JOB, LOG, MODEL, RESULTS, PackedRun, Runs


def has_runs(folder: Path) -> bool:
    """Whether folders of runs are in it, packed or not."""
    return bool(Runs(folder).names())


def pack_runs(out: Path) -> dict[str, str | None]:
    """Pack what is finished (pilots, runs that are trained and evaluated, and those whose weights are gone, so that
    nothing more can be measured): None by run, or why it was left.

    Safe between processes. The folder of a packed run goes, but for weights and what was drawn there. Raises CossError.
    """
    runs, told, new = Runs(out), dict[str, str | None](), dict[str, PackedRun]()
    if not has_runs(out):
        return told
    with runs.locked():
        kept = runs.packed()
        with ExitStack() as at_rest:
            for name in runs.names():
                if runs.is_packed(name):
                    continue
                told[name] = _unfinished(out / name) or _held(out / name / RESULTS, at_rest)
                if told[name] is None:
                    new[name] = runs.loose(name)
            if new:
                runs.replace({**kept, **new})
            for name, files in {**kept, **new}.items():
                if name in new or runs.is_packed(name):  # left by a process that was killed here
                    own = runs.loose(name)
                    runs.remove(name, [file for file in own if own[file].content == files[file].content])
        for name in {**kept, **new}:  # their locks are gone
            for folder in (out / name / RESULTS, out / name):
                with suppress(OSError):  # weights or pages are in it
                    folder.rmdir()
    return told


def _unfinished(folder: Path) -> str | None:
    job = folder / JOB
    try:
        gone = not (folder / MODEL).exists()
        done = _is_done(job.read_bytes(), gone) if job.exists() else _is_trained((folder / LOG).read_bytes())
    except (ValueError, TypeError, LookupError):
        return f"its {JOB if job.exists() else LOG} is damaged"
    return None if done else "not finished"


def _is_done(job: bytes, gone: bool) -> bool:
    record = json.loads(job)
    return "knn" in record or "evaluated" in record or ("sha256" in record and gone)


def _is_trained(log: bytes) -> bool:
    """Whether a run of training alone has reached its last epoch, which is where its last probe is."""
    first, last = (json.loads(line) for line in (log.splitlines()[0], log.splitlines()[-1]))
    return bool(last["kind"] == "probe" and last["epoch"] == first["config"]["epochs"])


def _held(results: Path, at_rest: ExitStack) -> str | None:
    """Pack the cells of a run and hold its store; why that cannot be done."""
    if not results.is_dir():
        return None
    store = Store(results)
    return store.pack() or at_rest.enter_context(store.at_rest())
