"""One pass of a network over batches: where it runs, how batches get there ahead of time, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from coss_eval.data.batches import Batch
from coss_eval.errors import CossError, UsageError
from coss_eval.models.classifier import to_float
from coss_eval.models.trial import evaluating
from coss_eval.runtime.background import in_background
from coss_eval.runtime.device import exact_float32, resolve_device
from coss_eval.runtime.memory import keep_freed_memory

T = TypeVar("T")

FINITE_ROWS = 4_096  # looked at together


class Predictions(NamedTuple):
    """What a classifier says of each image, on the CPU, in the images' order."""

    ids: Tensor  # int64 (N,)
    labels: Tensor  # int64 (N,)
    logits: Tensor  # float32 (N, K)


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
    bad = ids[~finite_rows(values)].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        raise CossError(
            f"{what} hold NaN or infinity for {len(bad)} of {len(ids)} images (sample ids {shown}): check the weights "
            "and the normalisation"
        )


def finite_rows(values: Tensor) -> Tensor:
    """bool (N,): whether all of each row of ``values`` (N, ...) is finite; memory does not grow with N beyond that."""
    return torch.cat([part.isfinite().flatten(1).all(1) for part in torch.split(values, FINITE_ROWS)])


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
