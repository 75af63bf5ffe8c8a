"""Cells and training runs over machines by Ray, which schedules them, begins lost ones again and keeps their logs.

A job claims what it is at and stores it as soon as it is there, as processes on one machine do: every node has to see
the folder, and whatever dies, nothing is computed twice and the same call goes on. Of Ray's this needs a connection,
tasks, one ``put`` and ``wait``.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from coss_eval.errors import CossError, UsageError
from coss_eval.evaluation.planning import Job, Plan
from coss_eval.evaluation.progress import Progress
from coss_eval.evaluation.run import Outcome, Run, ended, execute, provenance, work
from coss_eval.runtime.device import resolve_device
from coss_eval.runtime.disk import Lock
from coss_eval.runtime.provenance import made_with
from coss_eval.sweeps.plan import Sweep, TrainingRun
from coss_eval.sweeps.report import report
from coss_eval.sweeps.state import EPOCHS, LOCK, State, in_order, settled, states
from coss_eval.sweeps.work import Worker, named

CELLS = 8  # of one task of Ray's at most: a node that dies loses no more than one, but the others begin elsewhere
RETRIES = 3  # of a task whose worker or node died, each of which may die of the task itself; Ray's own default
PATIENCE = 60.0  # seconds to wait for who holds a claim: a node's processes may outlive it for some
POLL = 1.0  # seconds between two looks at the store
ANSWER = 10.0  # seconds that an address has to answer in
CLIENT_PORT = 10001  # of ray://host, Ray's own default


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where Ray is, and what one job takes of it.

    ``address`` None: RAY_ADDRESS, else a cluster that runs on this machine, else this machine alone. ``gpus`` None: one
    where the cluster has any, unless the device is the CPU. Ray shows a job its own GPUs alone, so the device has no
    number.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if ":" in self.device or "," in self.device:
            raise UsageError(f"Ray gives every job a GPU of its own: give --device cuda, not {self.device}")
        if self.cpus < 0 or (self.gpus or 0) < 0 or not (self.cpus or self.gpus):
            raise UsageError("a job of Ray's takes a part of some CPU or GPU: give --cpus-per-job above 0")
        if find_spec("ray") is None:  # known before anything is planned
            raise UsageError("--engine ray needs Ray: pip install 'coss-eval[ray]'")


class _Ray:
    """A cluster that this process is connected to; ``call`` begins a function of this package on one of its nodes."""

    def __init__(self, ray: Any, cluster: Cluster) -> None:
        self._ray, self._folder, self._there = ray, os.getcwd(), ray.cluster_resources()
        gpus = cluster.gpus
        if gpus is None:
            gpus = float(cluster.device != "cpu" and self._there.get("GPU", 0) >= 1)
        needs = {"CPU": cluster.cpus, "GPU": gpus}
        self.jobs = max(1, int(min(self._there.get(name, 0) // part for name, part in needs.items() if part)))
        self._begin = ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_retries=RETRIES)(_in_folder)
        self.put, self.version = ray.put, ray.__version__

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        return self._begin.remote(function, self._folder, *given)

    def ended(self, begun: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Those that have ended by then; without ``seconds`` one at least."""
        ended: list[Any] = self._ray.wait(list(begun), num_returns=1, timeout=seconds)[0]
        return ended

    def result(self, one: Any) -> Any:
        """What the function gave. CossError where it was lost with its workers, or could not begin."""
        try:
            return self._ray.get(one)
        except self._ray.exceptions.RayTaskError as error:
            cause, said = error.cause, str(error.cause).partition("\n")[0]
            raise CossError(said if isinstance(cause, CossError) else f"{type(cause).__name__}: {said}") from error
        except self._ray.exceptions.RayError as error:
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise CossError(f"Ray gave it up, after {RETRIES} retries where its worker died ({why})") from error

    def cancel(self, begun: Sequence[Any]) -> None:
        for one in begun:
            self._ray.cancel(one)


@contextmanager
def connected(cluster: Cluster) -> Iterator[_Ray]:
    """Ray, as this process's engine. CossError where nobody answers."""
    import ray

    if ray.is_initialized():  # whoever did it ends it
        yield _Ray(ray, cluster)
        return
    _refuse_silence(cluster.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster begun here: nothing is sent to anybody
    own = {name: value for name, value in os.environ.items() if name.startswith(("COSS_", "OMP_NUM_THREADS"))}
    try:
        ray.init(address=cluster.address, logging_level="warning", runtime_env={"env_vars": own})
    except Exception as error:  # what it raises differs by address and release
        where = "on this machine" if cluster.address in (None, "auto") else f"at {cluster.address}"
        reason = str(error).strip().partition("\n")[0]
        raise CossError(
            f"no Ray {where} ({reason}); start it there with ray start --head, or leave out --address for this machine"
        ) from error
    try:
        yield _Ray(ray, cluster)
    finally:
        ray.shutdown()


def _refuse_silence(address: str | None) -> None:
    """CossError where nobody listens: Ray itself asks for minutes."""
    there = re.fullmatch(r"(?:ray://)?([\w.-]+|\[[\da-fA-F:.]+\])(?::(\d+))?", address or "auto")
    if there is None:
        raise UsageError(f"--address {address}: expected auto, HOST:PORT or ray://HOST:PORT")
    if address is None or address in ("auto", "local"):
        return
    host, port = there[1].strip("[]"), int(there[2] or CLIENT_PORT)
    try:
        socket.create_connection((host, port), ANSWER).close()
    except (OSError, OverflowError) as error:
        raise CossError(
            f"nobody answers at {address} ({error}); start Ray there with ray start --head, and give what it says"
        ) from error


def _in_folder(function: Callable[..., Any], folder: str, *given: Any) -> Any:
    """On a node: in the folder that the call was given in, so that paths mean the same."""
    try:
        with chdir(folder):
            return function(*given)
    except FileNotFoundError as error:
        if error.filename != folder:
            raise
        raise CossError(f"a node of Ray's has no folder {folder}: work in one that all nodes share") from error


def execute_on_ray(
    planned: Plan,
    cluster: Cluster,
    *,
    budget_hours: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """``evaluation.execute`` with the cells spread over a cluster's nodes, which load networks and images themselves.

    Probes that cells need are fitted first, one job each, into the cache; where nodes share none, each fits its own.
    After ``budget_hours``, by the nodes' clocks, no new cell begins. A full disk ends all.
    """
    if not planned.jobs:
        return execute(planned)
    with connected(cluster) as ray:
        made = _seen(ray, planned.store.path, cluster.device)
        entry = provenance(planned) | made | {"engine": f"ray {ray.version}"}
        planned.store.record_run(entry)
        return ended(planned, entry, _spread(ray, planned, cluster.device, budget_hours, on_progress))


def _seen(ray: _Ray, out: Path, device: str) -> dict[str, Any]:
    """What a node computes with, which has to see the folder that results go into. CossError where it does not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CossError(f"cannot write results into {out}: {error.strerror}; give another --out") from error
    made: dict[str, Any] = ray.result(ray.call(_look, str(out), device))
    return made


def _look(out: str, device: str) -> dict[str, Any]:
    """On a node: what cells are computed with there."""
    if not Path(out).is_dir():
        raise CossError(f"a node of Ray's sees no folder {out}: give an --out that all nodes share")
    made = made_with(resolve_device(device))
    return {name: made[name] for name in ("versions", "device", "device_name", "threads")}


def _spread(
    ray: _Ray,
    planned: Plan,
    device: str,
    budget_hours: float | None,
    on_progress: Callable[[Progress], None] | None,
) -> list[Outcome]:
    """Begin all chunks, and look until they have ended."""
    done, plan = _DoneJobs(planned, on_progress), ray.put(planned)
    places = {id(subject): i for i, subject in enumerate(planned.subjects)}
    fitted = {i: ray.call(_fit, plan, i, device) for i in _to_fit(planned)}
    outcomes, begun = list[Outcome](), dict[Any, list[int]]()
    for numbers in chunks(planned.jobs, ray.jobs):
        own = [places[id(subject)] for subject in planned.jobs[numbers[0]].subjects]
        after = [fitted[i] for i in own if i in fitted]
        begun[ray.call(_cells, plan, numbers, device, budget_hours, time.time(), *after)] = numbers
    while begun:
        for one in ray.ended(list(begun), POLL):
            numbers = begun.pop(one)
            try:
                outcome: Outcome = ray.result(one)
            except CossError as error:
                jobs = [planned.jobs[number] for number in numbers]
                outcome = Outcome({key: f"{job.label}: {error}" for job in jobs for key in job.keys})
            outcomes.append(outcome)
            done.ended(numbers)
            if outcome.full:
                ray.cancel(list(begun))
                return outcomes
        done.look()
    return outcomes


class _DoneJobs:
    """How many jobs of a plan are done, as the store has them."""

    def __init__(self, planned: Plan, on_progress: Callable[[Progress], None] | None) -> None:
        self._planned, self._say = planned, on_progress
        self._left, self._last = set(range(len(planned.jobs))), ""
        self.look()

    def ended(self, numbers: Sequence[int]) -> None:
        self._done([number for number in numbers if number in self._left])

    def look(self) -> None:
        """Say what is there now; cells that were there before tell nothing."""
        there = self._planned.store.loose_keys() - self._planned.replaced.keys()
        self._done([number for number in sorted(self._left) if there.issuperset(self._planned.jobs[number].keys)])

    def _done(self, numbers: Sequence[int]) -> None:
        jobs = self._planned.jobs
        if self._say is None or (not numbers and self._last):
            return
        self._left -= set(numbers)
        self._last = jobs[numbers[-1]].label if numbers else "waiting for the first cell"
        self._say(Progress(len(jobs) - len(self._left), len(jobs), self._last if self._left else "done"))


def chunks(jobs: Sequence[Job], places: int) -> list[list[int]]:
    """The numbers of jobs of the same networks, in order: several a chunk, as long as each place has four or more."""
    size = min(CELLS, max(1, len(jobs) // (4 * places)))
    found = list[list[int]]()
    for _, group in groupby(range(len(jobs)), key=lambda number: [id(subject) for subject in jobs[number].subjects]):
        numbers = list(group)
        found += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return found


def _to_fit(planned: Plan) -> list[int]:
    """The subjects whose cells need a probe that a cache can hold."""
    wanted = {id(subject) for job in planned.jobs if job.task.uses_head for subject in job.subjects}
    return [
        i
        for i, subject in enumerate(planned.subjects)
        if id(subject) in wanted and subject.compute.cache and subject.head_protocol()["head"] == "probe"
    ]


def _fit(planned: Plan, number: int, device: str) -> None:
    """On a node: have one subject's probe in the cache. Where that fails, its cells fail alike and say how."""
    subject = _placed(planned, device).subjects[number]
    try:
        _ = subject.classifier
    except Exception:  # noqa: BLE001 - a network's own code may fail in any way
        return


def _cells(
    planned: Plan, numbers: Sequence[int], device: str, budget_hours: float | None, begun: float, *_: None
) -> Outcome:
    """On a node: some jobs of a plan; what another process is at is waited for, which may be one of a dead node's."""
    planned, failures, deadline = _placed(planned, device), dict[str, str](), time.monotonic() + PATIENCE
    planned.jobs = [planned.jobs[number] for number in numbers]
    while True:
        outcome = work(planned, budget_hours, None, used=(time.time() - begun) / 3600)
        outcome.failures = failures = failures | outcome.failures
        if not outcome.held or outcome.stopped is not None or time.monotonic() > deadline:
            return outcome
        held = [(job, [key for key in job.keys if key in outcome.held]) for job in planned.jobs]
        planned.jobs = [job.of(keys) for job, keys in held if keys]
        time.sleep(POLL)


def _placed(planned: Plan, device: str) -> Plan:
    """The plan with its networks on this node's own device."""
    own = resolve_device(device)
    for subject in planned.subjects:
        subject.compute = replace(subject.compute, device=own)
    return planned


def _wait(is_free: Callable[[], bool]) -> bool:
    """Whether nobody else holds it, within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not is_free():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


@dataclass
class SweepOnRay:
    """A sweep's runs over a cluster: a job is one step of one run, trained or evaluated; then comes the report.

    ``on_run`` gets each run with what has become of it.
    """

    sweep: Sweep
    out: Path
    work: Path
    cluster: Cluster
    data_root: Path | None = None
    minutes: float | None = None
    on_run: Callable[[TrainingRun, str], None] = lambda run, what: None
    held: list[str] = field(default_factory=list)  # lines on runs that another process was at, and has not done

    def run(self, number: int | None = None) -> list[str]:
        """All steps that are left, or those of run ``number``; a line for each that failed."""
        self._ends = None if self.minutes is None else time.time() + 60 * self.minutes
        self._failures, self._left_out, self._elsewhere = list[str](), set[int](), set[int]()
        with connected(self.cluster) as ray:
            _seen(ray, self.out, self.cluster.device)
            if self.sweep.run_minutes is not None and not (self.out / EPOCHS).exists():
                ray.result(ray.call(_settle, self._worker()))
            self._sweep = settled(self.sweep, self.out)
            begun = dict[Any, State]()
            while self._begin(ray, begun, number):
                for one in ray.ended(list(begun)):
                    self._ended(ray, one, begun.pop(one))
        everything = states(self._sweep, self.out, self.work)
        report(self._sweep, everything, self.out)
        self.held = [named(s.run) for s in everything if s.run.number in self._elsewhere and s.stage != "done"]
        return self._failures

    def _worker(self) -> Worker:
        return Worker(self.sweep, self.out, self.work, data_root=self.data_root, device=self.cluster.device)

    def _begin(self, ray: _Ray, begun: dict[Any, State], number: int | None) -> bool:
        """Begin every step that can be done now and is not; False where none is at work then."""
        everything = states(self._sweep, self.out, self.work)
        if number is not None and not 1 <= number <= len(everything):
            raise UsageError(f"this sweep has runs 1 to {len(everything)}, not {number}; --list shows them")
        busy = {state.run.number for state in begun.values()} | self._left_out
        first = self._sweep.train_first and any(
            state.next_step == "train" and state.run.number not in self._left_out for state in everything
        )
        for state in in_order(everything, train_first=first):
            step = state.next_step
            if state.run.number in busy or step is None or number not in (None, state.run.number):
                continue
            if not (first and step == "evaluate" and number is None):
                begun[ray.call(_step, self._worker(), state.run, self._ends)] = state
        return bool(begun)

    def _ended(self, ray: _Ray, one: Any, state: State) -> None:
        """Tell what became of a step; what did not get further is left out from then on."""
        run = state.run
        try:
            step: _StepTaken = ray.result(one)
        except CossError as error:
            step = _StepTaken(False, [], [f"{named(run)}: {error}"], False)
        if step.taken and not step.failures:
            self.on_run(run, "has been trained" if state.next_step == "train" else "has been evaluated")
        for what in [] if step.taken else step.told:
            self.on_run(run, what)
        self._failures += step.failures
        if step.held:
            self._elsewhere.add(run.number)
        if step.failures or not step.taken:
            self._left_out.add(run.number)


@dataclass(frozen=True)
class _StepTaken:
    """What became of a step on a node: whether it was taken, what was told of it, what failed, who else is at it."""

    taken: bool
    told: list[str]
    failures: list[str]
    held: bool


def _settle(worker: Worker) -> None:
    """On a node: measure what fits into the time of a run."""
    worker.settle()


def _step(worker: Worker, run: TrainingRun, ends: float | None) -> _StepTaken:
    """On a node: the next step of a run."""
    told = list[str]()
    worker.on_run = lambda _, what: told.append(what)
    worker.minutes = None if ends is None else (ends - time.time()) / 60
    _wait(lambda: _can_be_taken(worker.work / run.name))
    return _StepTaken(worker.step(run.number), told, worker.failures, bool(worker.held))


def _can_be_taken(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(folder / LOCK)
    if lock is not None:
        lock.release()
    return lock is not None
