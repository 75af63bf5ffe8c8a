"""The training loop: steps without a synchronisation, checkpoints inside and after epochs, and exact resumption."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coss_eval.checkpoints.load import save_model
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.model import Model
from coss_eval.runtime.device import exact_float32
from coss_eval.runtime.disk import Lock, remove_leftovers
from coss_eval.runtime.live import training_line
from coss_eval.runtime.memory import out_of_memory
from coss_eval.runtime.processes import gathered, process_group, rank, world_size
from coss_eval.runtime.provenance import git_commit, made_with
from coss_eval.store.runs import MODEL
from coss_eval.training import checkpoint
from coss_eval.training.config import Config, resolve
from coss_eval.training.feed import BatchPart
from coss_eval.training.gather import mean_over_ranks
from coss_eval.training.graph import GraphedPasses, refusal
from coss_eval.training.interruptions import Interruptions, Stopped
from coss_eval.training.log import RunLog
from coss_eval.training.monitor import Monitor
from coss_eval.training.optim import cosine, set_lr, warm_up_cosine
from coss_eval.training.pretraining import Losses
from coss_eval.training.setup import Setup

LAST = "last.pt"


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands: for the progress line."""

    epoch: int  # the one in progress, from 1
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float
    knn: float | None = None


def train(
    method: str,
    data: DatasetLike,
    *,
    preset: str | None = None,
    out: str | Path,
    resume: bool = False,
    device: str | torch.device = "auto",
    quiet: bool = False,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Model:
    """Train ``method`` on ``data.train`` and return the Model, also written to out/model.safetensors.

    ``data`` is what ``as_dataset`` takes; a single split is the training split.

    ``overrides``: fields of Config, LocalConfig or the method. ``out`` gets last.pt (the trainer's state),
    log.jsonl and the model. ``resume`` goes on from last.pt, where there is one, exactly as if never interrupted, and
    refuses where the configuration or the images are others. Ctrl-C, SIGTERM and SIGUSR1 save last.pt after the step
    in progress, inside an epoch, too, and do what they do then; a second Ctrl-C does not wait. A progress line is
    shown, but not with ``quiet`` or where ``on_progress`` takes its place. ``on_note`` gets what a person should know
    (alarms); ``ce.train`` warns with it unless ``quiet``.

    >>> import tempfile, coss_eval as ce
    >>> images = ce.load_dataset("digits").train.limited(128)
    >>> small = {"arch": "resnet18", "stem": "cifar", "width": 4, "epochs": 1, "warm_up_epochs": 0, "batch_size": 64}
    >>> model = ce.train("co-byol", images, out=tempfile.mkdtemp() + "/run", quiet=True, **small)
    >>> model.backbone.dim
    32
    """
    config = resolve(method, preset, **overrides)
    data = dataset_of(data, alone="train")
    silent = quiet or on_progress is not None or os.environ.get("RANK", "0") != "0"  # one of torchrun's processes
    with training_line(method, quiet=silent) as line:
        return train_config(
            config, data, out=out, resume=resume, device=device, on_progress=on_progress or line, on_note=on_note
        )


def train_config(
    config: Config,
    data: Dataset,
    *,
    out: str | Path,
    resume: bool = False,
    device: str | torch.device = "auto",
    on_progress: Callable[[TrainingProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Model:
    """``train`` by a configuration that ``resolve`` made."""
    _refuse_another(Path(out), resume)
    try:
        with process_group(device) as own, exact_float32(), memory_told(config):
            return Trainer(config, data, Path(out), own, resume=resume, on_progress=on_progress, on_note=on_note).run()
    except Stopped as stopped:
        number = stopped.number
    signal.raise_signal(number)  # to whoever obeys it when nothing is trained
    raise KeyboardInterrupt


@contextmanager
def memory_told(config: Config) -> Iterator[None]:
    """CossError that says what to set, where memory runs out: another batch is another run, so none is halved."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        share, more = config.batch_size // world_size(), 2 * config.accumulate
        keeps = f"accumulate={more}, which keeps the batch of {config.batch_size}, or "
        able = not config.kind.couples_samples and share % more == 0 and share // more >= 2
        raise CossError(
            f"out of memory with {share // config.accumulate} images at a time; start again with --set "
            f"{keeps if able else ''}batch_size={config.batch_size // 2}; --dry-run says what a run needs"
        ) from error


def _refuse_another(out: Path, resume: bool) -> None:
    """UsageError where the folder holds a run that is not to go on, or cannot."""
    last, model = ((out / name).exists() for name in (LAST, MODEL))
    if (last or model) and not resume:
        raise UsageError(f"{out} holds a run already; pass --resume to go on with it, or choose another folder")
    if model and not last:
        raise UsageError(f"{out} holds a finished run without its {LAST}: nothing to go on from; choose another folder")


class Trainer:
    """One run in a folder: steps, log, alarms, checkpoints."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        out: Path,
        device: torch.device,
        *,
        resume: bool = False,
        on_progress: Callable[[TrainingProgress], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.out, self.device, self.resume = config, out, device, resume
        self.on_progress, self.on_note = on_progress, on_note
        self.first = rank() == 0
        self.setup = Setup(config, data, device)
        self.objective = self.setup.objective
        self.optimizer = self.setup.optimizer()
        self.network = self._network()
        self.graphed: GraphedPasses | None = None
        if refusal(config, device) is None:
            self.graphed = GraphedPasses(self.objective, device, on_note)
        self.epoch = self.step = 0
        self.log: RunLog | None = None  # of the first process, while it runs
        self.interruptions = Interruptions(config.checkpoint_minutes)
        self._recent: list[Tensor] = []  # losses that are not in the log yet
        self._random: list[Tensor] = []  # of this process, where it goes on inside an epoch
        self._knn: float | None = None
        self._bad = 0  # images that cannot be read and were told

    def _network(self) -> nn.Module:
        if world_size() == 1:
            return self.objective
        ids = [self.device] if self.device.type == "cuda" else None
        # the buffers are equal anyway: BatchNorm is synchronised, and centres are averaged over ranks
        known = signature(DistributedDataParallel).parameters
        unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        return DistributedDataParallel(self.objective, device_ids=ids, **cast(Any, {unsynced: False}))

    def run(self) -> Model:
        """All epochs that are left; the Model, written to out/model.safetensors by the first process.

        Raises Stopped after a signal, with all that was done saved.
        """
        lock = self._claim() if self.first else None
        try:
            if lock is not None:
                _refuse_another(self.out, self.resume)  # again: another process may have come and gone
            self._load()
            if self.first:
                self.log = RunLog(self.out, self.step)
                if self.epoch < self.config.epochs:
                    self.log.write("start", self.step, **self._provenance())
            self.monitor = Monitor(self.setup.fit, self.setup.select, self.device, min(self.setup.feed.share, 256))
            with self.interruptions:
                while self.epoch < self.config.epochs:
                    self._run_epoch()
                    if self.epoch < self.config.epochs:
                        self._stop_if_asked()
                model = self.setup.snapshot()
                if self.first:
                    self._write_model(model, MODEL)
                self.interruptions.refuse_to_go_on()
            return model
        finally:
            try:
                if self.log is not None:
                    self.log.close()
            finally:
                if lock is not None:
                    lock.release()

    def _claim(self) -> Lock:
        """The right to write into the folder, which is made."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(self.out / "lock")
        except OSError as error:
            raise UsageError(f"cannot write into {self.out}: {error.strerror}; choose another folder") from error
        if lock is None:
            raise UsageError(f"another process is training in {self.out}; wait for it, or choose another folder")
        return lock

    def _run_epoch(self) -> None:
        self._since = time.perf_counter(), self.step
        done, steps = self.step - self.epoch * self.setup.feed.steps, self.setup.feed.steps
        with random_layers(self.config.seed, self.epoch, self.device, self._random):
            self._random = []
            for number, batch in enumerate(self.setup.feed.epoch(self.epoch, done), done + 1):
                self._recent.append(self.take_step(batch))
                if len(self._recent) >= self.config.log_every:
                    self._note_losses()
                if self.interruptions.look() and number < steps:
                    self._save_inside()
                    self._stop_if_asked()
            self._note_losses()
        self._refuse_weights_that_are_no_numbers()
        self._tell_bad_images()
        self.epoch += 1
        last = self.epoch == self.config.epochs
        if self.first and self.config.probe_every and (last or self.epoch % self.config.probe_every == 0):
            self._look()
        # before the state that says that this epoch is done, else a kill between the two would lose it
        if self.first and self.config.keep_every and self.epoch % self.config.keep_every == 0:
            self._write_model(self.setup.snapshot(), f"epoch-{self.epoch:04d}.safetensors")
        if last or self.epoch % self.config.checkpoint_every == 0 or self.interruptions.wanted:
            self._save(None)

    def _save_inside(self) -> None:
        """The state between two steps of an epoch, with the losses and the random numbers that a new epoch has not."""
        losses = mean_over_ranks(torch.stack(self._recent)) if self._recent else torch.zeros(0, 3)
        if not losses.isfinite().all():
            self._note_losses()  # raises
        self._refuse_weights_that_are_no_numbers()
        self._save({"losses": losses.cpu(), "random": gathered(random_state(self.device))})

    def _save(self, inside: dict[str, Any] | None) -> None:
        if self.first:
            checkpoint.save(self.out / LAST, self._state() | {"inside": inside})
        self.interruptions.saved()

    def _stop_if_asked(self) -> None:
        """Stopped, the same in every process, where one was asked to; the first one says how to go on."""
        if not self.interruptions.stop:
            return
        if self.first and self.on_note is not None:
            self.on_note(
                f"stopped after step {self.step} of {self.setup.total}, saved in {self.out / LAST}; "
                "the same call with --resume (resume=True) goes on from there"
            )
        raise Stopped(self.interruptions.stop)

    def take_step(self, batch: BatchPart) -> Tensor:
        """One optimiser step on this rank's part of a batch: its losses (total, global, local), still on the device."""
        config, progress = self.config, self.step / self.setup.total
        warm_up = round(config.warm_up_epochs * self.setup.feed.steps)
        lr = warm_up_cosine(config.peak_lr, self.step, warm_up=warm_up, total=self.setup.total)
        set_lr(self.optimizer, lr, config.peak_lr)
        losses = torch.stack([self._backward(part, wait=wait) for part, wait in self._parts(batch)]).mean(0)
        self.objective.before_step(progress)
        if config.clip_gradient:
            nn.utils.clip_grad_norm_(self.objective.parameters(), config.clip_gradient, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.ema(cosine(config.ema, 1.0, progress))
        self.step += 1
        self.objective.after_step(self.step / self.setup.total)
        return losses

    def _parts(self, batch: BatchPart) -> Iterator[tuple[BatchPart, bool]]:
        """The micro-batches of a step, and whether gradients wait for those that follow."""
        parts = batch.chunks(self.config.accumulate)
        for i, part in enumerate(parts):
            yield part, i < len(parts) - 1

    def _backward(self, batch: BatchPart, *, wait: bool) -> Tensor:
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.graphed is not None:
            return self._by_graph(self.graphed, batch, labels)
        views, network = self.setup.views_of(batch, self.epoch), self.network
        with network.no_sync() if wait and isinstance(network, DistributedDataParallel) else nullcontext():
            return self._passes(views, labels, batch.ids)

    def _by_graph(self, graphed: GraphedPasses, batch: BatchPart, labels: Tensor) -> Tensor:
        """The passes of views and labels; of small images with the views, from images and what was drawn for each."""
        if not self.setup.feed.static:
            views = self.setup.views_of(batch, self.epoch)
            return graphed(lambda inputs: self._passes(inputs[:-1], inputs[-1]), [*views, labels])
        drawn = batch.draws(self.setup.views, seed=self.config.seed, epoch=self.epoch)
        drawn = [each.on(self.device) for each in drawn]
        count = len(batch.pixels)

        def passes(inputs: Sequence[Tensor]) -> Tensor:
            pixels, rest = inputs[:count], iter(inputs[count:])
            return self._passes(self.setup.make(pixels, [each.like(rest) for each in drawn]), next(rest))

        return graphed(passes, [*batch.pixels, *(tensor for each in drawn for tensor in each.tensors()), labels])

    def _passes(self, views: Sequence[Tensor], labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Forward and backward: the losses (total, global, local), the gradients where the optimiser finds them.

        ``ids`` are for locals that are drawn.
        """
        losses: Losses = self.network(views, labels, full=len(self.setup.views.full), ids=ids, epoch=self.epoch)
        (losses.total / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        local = losses.global_.new_zeros(()) if losses.local is None else losses.local
        return torch.stack([losses.total.detach(), losses.global_, local])

    def _note_losses(self) -> None:
        """Fetch the losses since the last call, the only wait for the device; stop at the first that is no number."""
        if not self._recent:
            return
        losses = mean_over_ranks(torch.stack(self._recent)).cpu()  # (steps, 3)
        first = self.step - len(losses)
        self._recent.clear()
        bad = (~losses[:, 0].isfinite()).nonzero()
        if len(bad):
            raise self._not_finite(f"the loss became {losses[bad[0, 0], 0].item()}", first + int(bad[0, 0]) + 1)
        total, global_, local = losses.mean(0).tolist()
        started, step = self._since
        seconds = time.perf_counter() - started
        rate = (self.step - step) * self.config.batch_size / seconds
        left = (self.setup.total - self.step) * self.config.batch_size / rate
        if self.log is not None:
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            own = {"local": local} if self.config.local is not None else {}
            self.log.write(
                "train",
                self.step,
                epoch=self.epoch + 1,
                loss=total,
                **{"global": global_},
                **own,
                lr=lr,
                images_per_second=rate,
            )
        if self.first and self.on_progress is not None:
            self.on_progress(
                TrainingProgress(
                    self.epoch + 1, self.config.epochs, self.step, self.setup.total, total, rate, left, self._knn
                )
            )

    def _not_finite(self, what: str, step: int) -> CossError:
        path = self.out / LAST
        good = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        return CossError(
            f"{what} at step {step} (epoch {self.epoch + 1}); {good}; try a smaller lr than {self.config.lr}"
        )

    def _look(self) -> None:
        """Online probes and the signs of collapse."""
        health = self.monitor.look(self.setup.snapshot())
        self._knn = health.knn
        assert self.log is not None
        self.log.write("probe", self.step, epoch=self.epoch, **asdict(health), alarm=health.alarm)
        if health.alarm is not None and self.on_note is not None:
            self.on_note(f"epoch {self.epoch}: {health.alarm}")

    def _refuse_weights_that_are_no_numbers(self) -> None:
        norms = torch.stack(torch._foreach_norm(list(self.objective.parameters())))
        if not math.isfinite(norms.sum().item()):
            raise self._not_finite("a weight is no finite number", self.step)

    def _tell_bad_images(self) -> None:
        """Which images were left out by the person's wish, where there are more than before."""
        bad = self.setup.fit.bad_images
        if not self.first or len(bad) <= self._bad:
            return
        self._bad = len(bad)
        named = "; ".join(f"{key} ({why})" for key, why in list(bad.items())[:5])
        if self.on_note is not None:
            self.on_note(f"{len(bad)} of {len(self.setup.fit):,} images cannot be read and are left out: {named}")

    def _write_model(self, model: Model, name: str) -> None:
        try:
            save_model(model, self.out / name)
        except CossError as error:
            if isinstance(error.__cause__, OSError):
                reason = error.__cause__.strerror
                raise CossError(f"cannot write {self.out / name}: {reason}; make room and --resume") from error
            raise

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.as_dict(),
            "data": self._data(),
            "threads": torch.get_num_threads(),
        }

    def _provenance(self) -> dict[str, Any]:
        """What this session of the run is made with; the log has one such line a session."""
        config = self.config.as_dict()
        return {"config": config, "data": self._data(), "git_commit": git_commit(), **made_with(self.device)}

    def _data(self) -> str:
        return f"{self.setup.fit.fingerprint} {self.setup.fit.protocol(self.setup.geometry)}"

    def _load(self) -> None:
        path = self.out / LAST
        if self.first:
            remove_leftovers(self.out, "*")
        found = self.resume and path.exists()
        if found:
            self._go_on_from(path)
        seen = gathered(self.step if found else None)
        if len(set(seen)) > 1:
            steps = ", ".join(f"process {i} {'none' if s is None else f'step {s}'}" for i, s in enumerate(seen))
            raise UsageError(
                f"the processes see different states of {path} ({steps}): give an --out on a file system that all share"
            )

    def _go_on_from(self, path: Path) -> None:
        state = checkpoint.load(path)
        checkpoint.refuse_other(state, self.config, self._data(), path)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._go_on_inside(state.get("inside"))
        other_threads = state["threads"] != torch.get_num_threads() and self.epoch < self.config.epochs
        if other_threads and self.first and self.on_note is not None:
            self.on_note(
                f"this run was made with {state['threads']} threads and goes on with {torch.get_num_threads()}: the "
                f"last digits may differ; OMP_NUM_THREADS={state['threads']} keeps them"
            )

    def _go_on_inside(self, inside: dict[str, Any] | None) -> None:
        """What a state has that was saved inside an epoch. With another number of processes dropout draws anew."""
        if inside is None:
            return
        self._recent = list(inside["losses"].to(self.device))
        if len(inside["random"]) == world_size():
            self._random = inside["random"][rank()]


@contextmanager
def random_layers(seed: int, epoch: int, device: torch.device, state: Sequence[Tensor] = ()) -> Iterator[None]:
    """Dropout and stochastic depth inside draw from (seed, epoch, rank); torch's generators are put back afterwards.

    Such layers know no generator of their own. ``state`` is what ``random_state`` was where the epoch goes on.
    """
    own = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank()]).generate_state(1)[0]))
        if state:
            torch.set_rng_state(state[0])
        if own and len(state) > 1:
            torch.cuda.set_rng_state(state[1], device)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    """The states of torch's generators that layers of this process draw from: the CPU's, and the GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
