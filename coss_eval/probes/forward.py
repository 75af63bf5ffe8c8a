"""One pass of a network over batches: where it runs, how batches get there ahead of time, what comes out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from coss_eval._memory import keep_freed_memory
from coss_eval.data.batches import Batch
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import to_float
from coss_eval.models.generic import evaluating

T = TypeVar("T")


class Predictions(NamedTuple):
    """What a classifier says of each image, on the CPU, in the images' order."""

    ids: Tensor  # int64 (N,)
    labels: Tensor  # int64 (N,)
    logits: Tensor  # float32 (N, K)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the GPU where CUDA has one, else the CPU; any other name is checked to be there."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # as a tensor there says it, which is "cuda:0" for "cuda"
        resolved = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used here ({reason}); try auto or cpu") from error
    return resolved


def predict(classifier: nn.Module, batches: Iterable[Batch], device: str | torch.device = "auto") -> Predictions:
    """The logits of every image: eval mode, no gradients, exact float32; only logits are kept in memory.

    ``classifier`` takes pixels in [0, 1] and is moved to the device; its mode is given back as it was.
    """
    target = resolve_device(device)
    ids, labels, logits = [], [], []
    with ready(classifier, target):
        for batch, found in outputs(classifier, batches, target):
            ids.append(batch.ids.cpu())
            labels.append(batch.labels.cpu())
            logits.append(found.cpu())
    if not ids:
        raise CossError("there is no image to predict: the batches are empty")
    found = Predictions(torch.cat(ids), torch.cat(labels), torch.cat(logits))
    refuse_non_finite(found.logits, found.ids, "the logits")
    return found


def refuse_non_finite(values: Tensor, ids: Tensor, what: str) -> None:
    """CossError that names the images whose row of ``values`` (N, D), on the CPU, holds NaN or infinity."""
    bad = ids[~values.isfinite().flatten(1).all(1)].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        raise CossError(
            f"{what} hold NaN or infinity for {len(bad)} of {len(ids)} images (sample ids {shown}): check the weights "
            "and the normalisation"
        )


@contextmanager
def finite_outputs(*modules: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Watch every output of ``modules`` while open; what is yielded says where the first NaN or infinity was.

    A forward pass adds to a flag on the device; only asking for it, None where all was finite, waits for the device.
    """
    first: dict[int, Any] = {}  # the number of the first bad pass by module, 0 where there is none
    passes = dict.fromkeys(range(len(modules)), 0)

    def watch(place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):  # while a tracer looks on
                return
            passes[place] += 1
            before = first.get(place, 0)
            bad = ~output.detach().isfinite().all() & (before == 0)
            first[place] = before + passes[place] * bad

        return hook

    def where() -> str | None:
        for place, number in first.items():
            if found := int(number):
                return f"batch {found} of the {passes[place]} that passed through it"
        return None

    handles = [module.register_forward_hook(watch(place)) for place, module in enumerate(modules)]
    try:
        yield where
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ready(network: nn.Module, device: torch.device) -> Iterator[None]:
    """``network`` on the device, channels-last, in eval mode, its products exact; its modes afterwards as before.

    On the CPU the process keeps its freed memory from then on (``keep_freed_memory``).
    """
    if device.type == "cpu":
        keep_freed_memory()
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
    with evaluating(network), exact_float32():
        yield


def outputs(
    compute: Callable[[Tensor], T], batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Batch, T]]:
    """Each batch with ``compute`` of its pixels, float32 in [0, 1].

    A result is handed over when the next one has been launched, so that the caller's work on it keeps no GPU waiting.
    """
    late: tuple[Batch, T] | None = None
    for batch in ahead(batches, device):
        with torch.inference_mode():
            result = compute(to_float(batch.images))
        if late is not None:
            yield late
        late = batch, result
    if late is not None:
        yield late


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, images on the device: the next one is fetched while the caller works on this one."""

    def moved() -> Iterator[Batch]:
        for batch in batches:
            if batch.images.device == device:
                yield batch
                continue
            images = batch.images.pin_memory() if device.type == "cuda" else batch.images
            yield batch._replace(images=images.to(device, non_blocking=True))

    return in_background(moved())


def in_background(items: Iterable[T]) -> Iterator[T]:
    """The same items (none of them None), each made in a thread while the caller works on the one before.

    The thread is a plain one: a process forked in a ThreadPoolExecutor's ends with exit code 1, as it cannot join the
    thread it came from, and torch takes a DataLoader's worker that does so for a crashed one.
    """
    source = iter(items)
    asked: SimpleQueue[Future[T | None] | None] = SimpleQueue()

    def make() -> None:
        while (future := asked.get()) is not None:
            try:
                future.set_result(next(source, None))
            except BaseException as error:  # noqa: BLE001 - the caller's to handle
                future.set_exception(error)

    def ask() -> Future[T | None]:
        asked.put(future := Future[T | None]())
        return future

    thread = Thread(target=make, name="in background", daemon=True)
    thread.start()
    try:
        upcoming = ask()
        while (item := upcoming.result()) is not None:
            upcoming = ask()
            yield item
    finally:
        asked.put(None)
        thread.join()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, after another to warm up; a GPU's work is waited for."""
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 or bf16 inside float32 products, as torch lets cuDNN do by default; afterwards as it was."""
    before = _tf32()
    _set_tf32("highest", convolutions=False)
    try:
        yield
    finally:
        _set_tf32(*before)


def _tf32() -> tuple[str, bool]:
    with _without_advice():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_tf32(products: str, convolutions: bool) -> None:
    with _without_advice():
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _without_advice() -> Iterator[None]:
    """torch 2.9 to 2.11 advise against these settings, which all versions have, in favour of ones that older lack."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*new API settings to control TF32")
        yield


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies as fractions, from logits or votes (N, K) and labels (N,): top1, top5 (where K > 5), mean_per_class.

    ``mean_per_class`` averages the accuracies of the classes that occur, whatever their sizes.
    """
    if not len(labels) or logits.shape[:1] != labels.shape:
        raise UsageError(f"expected (N, K) logits for N > 0 labels, got {tuple(logits.shape)} for {len(labels)}")
    hits = logits.argmax(1) == labels
    count = torch.bincount(labels, minlength=logits.shape[1])
    right = torch.bincount(labels[hits], minlength=logits.shape[1])
    present = count > 0
    found = {"top1": hits.double().mean().item()}
    if logits.shape[1] > 5:
        found["top5"] = (logits.topk(5, dim=1).indices == labels[:, None]).any(1).double().mean().item()
    return found | {"mean_per_class": (right[present] / count[present].double()).mean().item()}
