"""What a machine with a GPU takes for training steps, corruptions, attacks and redundancy, each against a bare pass.

    python benchmarks/gpu_speed.py --seconds 140 --out DIR      # a stage of gpu.py, which gives it a time limit

Each measurement has a box of seconds: contenders warm up, then take turns until the box is used up; a row holds the
median, the lowest and highest turn, and their number. Rows go to DIR/speed.jsonl as they come, the kernels that take
longest in a training step to DIR/kernels.txt. What fails, or does not fit the device's memory, is a row that says so.
Without a GPU networks, images and batches are tiny (the small form): that everything runs is all it shows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from training import dataset
from views import smooth_images

from coss_eval import redundancy
from coss_eval.corruptions import BENCHMARK, corrupt
from coss_eval.corruptions.names import SEVERITIES
from coss_eval.models.architecture import Architecture
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import training_format
from coss_eval.runtime.device import exact_float32
from coss_eval.training.config import resolve
from coss_eval.training.graph import WARM_UP
from coss_eval.training.loop import Trainer

SMALL = {"width": 8, "size": 32, "batch_size": 8, "hidden": 32}
TURNS = 8  # that a box is cut into for each contender
KERNELS = 25
Works = dict[str, Callable[[], object]]


class Timing(NamedTuple):
    """Seconds a call: over ``turns`` turns, several calls in each where one is short."""

    median: float
    low: float
    high: float
    turns: int


class Kind(NamedTuple):
    """A network that is trained: its preset, the sides of views and stored images, how many of these, the batch."""

    network: str
    preset: str
    size: int
    side: int
    images: int
    batch: int


STUDY = Kind("RF29-ResNet18", "tiny-imagenet-rf29-r18", 64, 64, 2048, 256)
LARGE = Kind("ResNet-50", "imagenet-r50-100ep", 224, 256, 1024, 256)
CIFAR = Kind("ResNet-18", "cifar10-r18", 32, 32, 4096, 256)


@dataclass
class Bench:
    """The device, its box of seconds, and where rows go."""

    device: torch.device
    out: Path
    seconds: float  # of all boxes together
    data_root: str | None

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"

    def title(self, method: str, kind: Kind) -> str:
        return (
            f"{method}, {kind.network} of width 8, 32 px" if self.small else f"{method}, {kind.network}, {kind.size} px"
        )

    def wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize(self.device)

    def race(self, works: Works, share: float) -> dict[str, Timing]:
        """Contenders in turns until ``share`` of all seconds is used up, one turn each at least."""
        box = share * self.seconds
        calls = {name: self._warm_up(work, box / len(works) / TURNS) for name, work in works.items()}
        taken: dict[str, list[float]] = {name: [] for name in works}
        end = time.perf_counter() + box
        while not all(taken.values()) or time.perf_counter() < end:
            for name, work in works.items():
                taken[name].append(self.turn(work, calls[name]) / calls[name])
        return {name: Timing(median(each), min(each), max(each), len(each)) for name, each in taken.items()}

    def _warm_up(self, work: Callable[[], object], turn: float) -> int:
        """How many calls fill a turn of so many seconds, by the second of two calls."""
        self.turn(work, 1)
        return max(1, int(turn / max(self.turn(work, 1), 1e-6)))

    def turn(self, work: Callable[[], object], calls: int) -> float:
        """Seconds of some calls; the device is waited for at the end alone, as a training run does."""
        self.wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return time.perf_counter() - started

    def row(self, what: str, **fields: Any) -> None:
        """One row: printed, and on the disk before the next measurement begins."""
        row = {
            "what": what,
            **fields,
            "device": torch.cuda.get_device_name(self.device) if not self.small else "CPU",
            "torch": torch.__version__,
            "small_form": self.small,
            "commit": os.environ.get("COSS_COMMIT"),
            "peak_gib": self.peak(),
        }
        with (self.out / "speed.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(shown(row), flush=True)

    def peak(self) -> float:
        """GiB at the peak since the job began: of the GPU's memory, else of the whole process."""
        if not self.small:
            return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def shown(row: dict[str, Any]) -> str:
    """A row as a person reads it."""
    if "error" in row:
        return f"{row['what']}: {row['error']}"
    line = f"{row['what']}: {row['value']:,.4g} {row['unit']}"
    if row.get("ratio") is not None:
        line += f"; against {row['against']}: {row['ratio']:.3g}"
    if row.get("goal") is not None:
        line += f" (goal {row['goal']})"
    return f"{line}; {row['precision']}, batch {row['batch']}, {row['peak_gib']} GiB, {row['turns']} turns"


def trainer(bench: Bench, kind: Kind, method: str, **others: Any) -> Trainer:
    """A run of the preset on smooth noise; nothing is written."""
    side, images, fields = kind.side, kind.images, {"batch_size": kind.batch}
    if bench.small:
        side, images, fields = 32, 64, dict(SMALL)
    images = max(images, int(fields["batch_size"]))
    data = dataset(smooth_images(images, side).numpy())
    config = resolve(method, kind.preset, holdout=0.0, probe_every=0, epochs=1000, **fields, **others)
    return Trainer(config, data, Path(), bench.device)


def steps_of(run: Trainer) -> Callable[[], Tensor]:
    """A call that takes the next step, epoch after epoch, as the loop does."""

    def batches() -> Iterator[Any]:
        while True:
            yield from run.setup.feed.epoch(run.epoch)
            run.epoch += 1

    upcoming = batches()
    return lambda: run.take_step(next(upcoming))


def bare_step(run: Trainer) -> Callable[[], None]:
    """Forward and backward of two views and the target's forward passes: the same networks and nothing else."""
    objective, batch = run.objective, next(iter(run.setup.feed.epoch(0)))
    views = run.setup.views_of(batch, 0)
    assert objective.target is not None
    target = objective.target

    def passes() -> None:
        with torch.autocast(run.device.type, torch.bfloat16):
            outputs = [objective.heads(objective.backbone(view)) for view in views]
            with torch.no_grad():
                for view in views:
                    target.projector(target.backbone(view))
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        objective.zero_grad(set_to_none=True)

    return passes


def on_given_views(bench: Bench, kind: Kind, method: str) -> Callable[[], Tensor]:
    """A step whose views are there already: what a step is without them."""
    run = trainer(bench, kind, method)
    batch = next(iter(run.setup.feed.epoch(0)))
    views = run.setup.views_of(batch, 0)
    run.setup.make = lambda pixels, drawn: views  # type: ignore[method-assign]
    return lambda: run.take_step(batch)


def launched_one_by_one(run: Trainer, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step without the CUDA graph of its passes."""

    def eager() -> Tensor:
        graphed, run.graphed = run.graphed, None
        try:
            return step()
        finally:
            run.graphed = graphed

    return eager


def train_steps(bench: Bench, kind: Kind, method: str, share: float, goal: float | None = None) -> None:
    """Images a second of a step, and what the views add to its time (goal: at most a tenth of it)."""
    run, given = trainer(bench, kind, method), on_given_views(bench, kind, method)
    first, batch, step = next(iter(run.setup.feed.epoch(0))), run.config.batch_size, steps_of(run)
    for _ in range(1 if bench.small else WARM_UP + 1):  # the last ones are captured
        step(), given()
    works: Works = {
        "step": step,
        "given": given,
        "eager": launched_one_by_one(run, step),
        "bare": bare_step(run),
        "views": lambda: run.setup.views_of(first, 0),
    }
    times = bench.race(works, share)
    assert run.take_step(first).isfinite().all(), "the loss is no number"
    took, without, eager, bare, views = (times[name] for name in works)
    common = {"precision": run.config.precision, "batch": batch, "turns": took.turns}
    name = bench.title(method, kind)
    bench.row(
        f"{name}: training step",
        value=batch / took.median,
        low=batch / took.high,
        high=batch / took.low,
        unit="images/s",
        against="bare forward and backward passes, launched one by one (share of their speed)",
        ratio=bare.median / took.median,
        graph=run.graphed is not None and not run.graphed.failed,
        goal=None if goal is None else f"at least {goal:,.0f} images/s",
        met=None if goal is None else batch / took.median >= goal,
        **common,
    )
    bench.row(
        f"{name}: the step without a CUDA graph",
        value=batch / eager.median,
        low=batch / eager.high,
        high=batch / eager.low,
        unit="images/s",
        against="the step (share of its speed)",
        ratio=took.median / eager.median,
        **common,
    )
    added = took.median - without.median
    bench.row(
        f"{name}: views",
        value=1000 * views.median,
        low=1000 * views.low,
        high=1000 * views.high,
        unit="ms a batch, made alone",
        against="a training step (what they add to one, as a share of its time)",
        ratio=added / took.median,
        goal="at most 0.1 of a step",
        met=added <= 0.1 * took.median,
        **common,
    )


def compiled_steps(bench: Bench, kind: Kind, method: str, share: float) -> None:
    """A step with --compile against one without, and how long it waits for the compiler."""
    started = time.perf_counter()
    plain, fast = trainer(bench, kind, method), trainer(bench, kind, method, compile=not bench.small)
    steps = {"plain": steps_of(plain), "compiled": steps_of(fast)}
    bench.turn(steps["compiled"], 1)
    waited = time.perf_counter() - started
    for step in steps.values():
        bench.turn(step, 1 if bench.small else WARM_UP + 1)
    own, without = (bench.race(steps, share)[name] for name in ("compiled", "plain"))
    batch = fast.config.batch_size
    bench.row(
        f"{bench.title(method, kind)}: training step, compiled",
        value=batch / own.median,
        low=batch / own.high,
        high=batch / own.low,
        unit="images/s",
        against=f"the step (times as fast); the first step took {waited:.0f} s",
        ratio=without.median / own.median,
        precision=fast.config.precision,
        batch=batch,
        turns=own.turns,
    )


def cifar_epoch(bench: Bench, share: float) -> None:
    """Seconds for 50,000 images of CIFAR-10's size by BYOL."""
    run = trainer(bench, CIFAR, "byol")
    batch, step = run.config.batch_size, steps_of(run)
    for _ in range(1 if bench.small else WARM_UP + 1):
        step()
    took = bench.race({"step": step}, share)["step"]
    epoch = [50_000 / batch * seconds for seconds in took[:3]]
    bench.row(
        f"{bench.title('byol', CIFAR)}: 50,000 images",
        **dict(zip(("value", "low", "high"), epoch, strict=True)),
        unit="s",
        goal="at most 3 s",
        met=epoch[0] <= 3,
        precision=run.config.precision,
        batch=batch,
        turns=took.turns,
    )


def kernels(bench: Bench, kind: Kind, method: str) -> None:
    """The kernels of one training step that take longest, appended to kernels.txt, and how long the device is busy."""
    run = trainer(bench, kind, method)
    step = steps_of(run)
    for _ in range(1 if bench.small else 5):
        step()
    wall = bench.turn(step, 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not bench.small:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        bench.wait()
    events = profile.key_averages()
    field = "self_cpu_time_total" if bench.small else "self_device_time_total"
    busy = sum(getattr(event, field) for event in events if bench.small or _is_kernel(event)) / 1e6
    table = events.table(sort_by=field, row_limit=KERNELS, max_name_column_width=90)
    launched = sum(event.count for event in events if event.key in ("cudaLaunchKernel", "cuLaunchKernel"))
    title = f"{bench.title(method, kind)}, batch {run.config.batch_size}, {run.config.precision}"
    with (bench.out / "kernels.txt").open("a") as file:
        file.write(f"{title}: a step takes {1000 * wall:.2f} ms; {1000 * busy:.2f} ms of work, {launched} launches\n")
        file.write(f"{table}\n")
    bench.row(
        f"{bench.title(method, kind)}: the device at work in a step",
        value=1000 * busy,
        unit="ms",
        against="the step without a profiler (share of its time)",
        ratio=busy / wall,
        launches=launched,
        precision=run.config.precision,
        batch=run.config.batch_size,
        turns=1,
    )


def _is_kernel(event: Any) -> bool:
    """Work of the device itself; what an operation of the CPU launched is counted there too."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


def resnet50(bench: Bench) -> Backbone:
    width = 8 if bench.small else 64
    backbone = Architecture("resnet50", width=width).backbone(seed=0)
    backbone.to(bench.device, memory_format=training_format(backbone, bench.device))
    return backbone.eval()


def corruptions(bench: Bench, share: float) -> None:
    """The mean over the 15 x 5 set of a batch at 224 px, against a ResNet-50's forward pass in full precision."""
    from corruptions import photographs

    side, count = (32, 8) if bench.small else (224, 64)
    pixels = torch.from_numpy(photographs(count, side)).permute(0, 3, 1, 2).contiguous().to(bench.device)
    ids, network = torch.arange(count, device=bench.device), resnet50(bench)
    floats = pixels.float().div(255).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), exact_float32():
            network(floats)

    def half() -> None:
        with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16):
            network(floats)

    passes = bench.race({"fp32": forward, "bf16": half}, share / 10)
    common = {"precision": "uint8", "batch": count, "unit": "ms a batch"}
    each: dict[str, list[Timing]] = {}
    for name in BENCHMARK:
        works: Works = {str(s): lambda s=s, n=name: corrupt(pixels, n, s, ids, table="imagenet") for s in SEVERITIES}
        each[name] = list(bench.race(works, 0.9 * share / len(BENCHMARK)).values())
    means = {name: 1000 * sum(time.median for time in times) / len(times) for name, times in each.items()}
    found = sum(means.values()) / len(means)
    for precision, goal in (("fp32", "at most 0.25 of a forward pass"), ("bf16", None)):
        theirs = 1000 * passes[precision].median
        bench.row(
            f"the 15 x 5 corruptions, {side} px, mean, against {precision}",
            value=found,
            low=min(means.values()),
            high=max(means.values()),
            against=f"a ResNet-50's forward pass, {precision}, {theirs:.3g} ms (share of its time)",
            ratio=found / theirs,
            goal=goal,
            met=None if goal is None else found <= 0.25 * theirs,
            turns=min(time.turns for times in each.values() for time in times),
            by_name={name: round(value, 4) for name, value in means.items()},
            **common,
        )


def adversaries(bench: Bench, share: float) -> None:
    """PGD-20 over four eps on an undefended network, against foolbox as its users run it."""
    from attacks import EPS, OUR_STEP, STEPS, Race, trained  # here, as foolbox may be missing

    from coss_eval.data.open import load_dataset

    sizes = {"images": 16, "width": 8, "epochs": 1, "train_images": 256} if bench.small else {}
    given = {"images": 256, "width": 64, "epochs": 8, "train_images": 10_000, **sizes}
    given |= {"ckpt": None, "device": str(bench.device), "rounds": 1, "clock": "wall"}
    name = "tiny-imagenet-50" if bench.data_root and not bench.small else "digits"
    data = load_dataset(name, root=bench.data_root if name != "digits" else None)
    arguments = argparse.Namespace(**given)
    race = Race(trained(data, arguments), data, arguments)
    works: Works = {
        "ours": lambda: race.ours(EPS, OUR_STEP),
        "foolbox": lambda: race.theirs(race.users, race.plain, EPS, OUR_STEP),
    }
    ours, theirs = bench.race(works, share).values()
    survive = race.ours(EPS[0]).robust_accuracy[0]
    bench.row(
        f"PGD-{STEPS}, eps 1, 2, 4, 8 /255, ResNet-18 on {data.name}",
        value=ours.median,
        low=ours.low,
        high=ours.high,
        unit="s",
        against=f"foolbox, {theirs.median:.3g} s (times as fast)",
        ratio=theirs.median / ours.median,
        goal="at least 8 times as fast",
        met=theirs.median >= 8 * ours.median,
        survive_first_eps=survive,
        precision="fp32",
        batch=len(race.images),
        turns=ours.turns,
    )


def redundancy_measure(bench: Bench, share: float) -> None:
    """``redundancy.measure`` of the study's network, which reads its images once, against a bare pass."""
    width, side, count, batch = (8, 32, 64, 16) if bench.small else (64, 64, 2048, 256)
    backbone = Architecture(resolve("byol", STUDY.preset).arch, width=width).backbone(seed=0)
    backbone.to(bench.device, memory_format=training_format(backbone, bench.device)).eval()
    batches = smooth_images(count, side).to(bench.device).float().div(255).split(batch)

    def bare() -> None:
        with torch.inference_mode(), exact_float32():
            for pixels in batches:
                backbone(pixels)

    def ours() -> None:
        with exact_float32():
            redundancy.measure(backbone, batches)

    mine, theirs = bench.race({"ours": ours, "bare": bare}, share).values()
    bench.row(
        f"redundancy of {count:,} images, RF29-ResNet18, {side} px",
        value=mine.median,
        low=mine.low,
        high=mine.high,
        unit="s",
        against=f"a bare forward pass, {theirs.median:.3g} s (times as long)",
        ratio=mine.median / theirs.median,
        goal="at most 1.2 times as long",
        met=mine.median <= 1.2 * theirs.median,
        precision="fp32, sums in float64",
        batch=batch,
        turns=mine.turns,
    )


JOBS: dict[
    str, tuple[float, Callable[[Bench, float], None]]
] = {  # share of the seconds that its box takes; the compiler
    # of the last one takes more than a minute
    "BYOL, ResNet-50": (0.1, lambda bench, share: train_steps(bench, LARGE, "byol", share, goal=2000)),
    "BYOL, the study's network": (0.06, lambda bench, share: train_steps(bench, STUDY, "byol", share)),
    "CO-BYOL, the study's network": (0.06, lambda bench, share: train_steps(bench, STUDY, "co-byol", share)),
    "BYOL, CIFAR": (0.04, cifar_epoch),
    "kernels, the study's network": (0.03, lambda bench, _: kernels(bench, STUDY, "co-byol")),
    "compiled, the study's network": (0.04, lambda bench, share: compiled_steps(bench, STUDY, "co-byol", share)),
    "CO-BYOL, ResNet-50": (0.07, lambda bench, share: train_steps(bench, LARGE, "co-byol", share)),
    "kernels, ResNet-50": (0.03, lambda bench, _: kernels(bench, LARGE, "byol")),
    "corruptions": (0.1, corruptions),
    "PGD": (0.06, adversaries),
    "redundancy": (0.03, redundancy_measure),
    "compiled, ResNet-50": (0.05, lambda bench, share: compiled_steps(bench, LARGE, "byol", share)),
}


def do(bench: Bench, name: str) -> bool:
    """One job; False where it failed, which a row tells."""
    share, work = JOBS[name]
    if not bench.small:
        torch.cuda.reset_peak_memory_stats(bench.device)
    try:
        work(bench, share)
    except torch.OutOfMemoryError as error:
        bench.row(name, error=f"out of memory on the device: {_line(error)}")
    except Exception as error:  # noqa: BLE001 - told in a row; the next one is measured
        bench.row(name, error=f"{type(error).__name__}: {_line(error)}")
    else:
        return True
    return False


def _line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--data-root", help="where tiny-imagenet-50 lies, for the attacks; else digits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(JOBS), action="append", help="some of the measurements")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(torch.device(arguments.device), arguments.out, arguments.seconds, arguments.data_root)
    started, failed = time.perf_counter(), 0
    for name in arguments.only or JOBS:
        if time.perf_counter() - started + JOBS[name][0] * arguments.seconds > arguments.seconds:
            bench.row(name, error="left out: its seconds are used up")
            continue
        failed += not do(bench, name)
        gc.collect()
        if not bench.small:
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
