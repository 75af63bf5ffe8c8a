"""Attacks on the representation itself: how far a small perturbation moves it, and what can still be read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.data.choose import Bools
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.models.classifier import to_float
from coss_eval.probes import fitted_probe, knn
from coss_eval.statistics import spread
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.attacks import AttacksOptions
from coss_eval.tasks.attacks.calls import CHUNK
from coss_eval.tasks.attacks.images import attacked_split, bounded_note
from coss_eval.tasks.task import Result, Subject

ATTACK = "representation"
STEPS = 20
NEIGHBOURS = 20
Reader = Callable[[Tensor], Tensor]  # representations (B, D') to the classes they are taken for (B,)


def check(options: AttacksOptions) -> None:
    """UsageError for options that do not fit this target."""
    others = sorted({attack for attack, _ in options.attacks} - {"pgd", "fgsm"})
    if others or options.loss != "auto" or options.backend != "native":
        wrong = f"--loss {options.loss}" if options.loss != "auto" else f"--backend {options.backend}"
        given = f"--attack {others[0]}" if others else wrong
        raise UsageError(f"--target representation is attacked by native PGD along its distance, got {given}")
    if not _norms(options):
        raise UsageError("--target representation is attacked by PGD: add --attack pgd:linf or pgd:l2")


def cells(options: AttacksOptions, subject: Subject, seed: int) -> list[Cell]:
    """One cell per norm of the PGD attacks asked for."""
    train = subject.data.train
    shared = {
        "images": options.images,
        "seed": seed,
        "steps": options.steps or STEPS,
        "step_size": options.step_size,
        "restarts": options.restarts,
        "train": None if train is None else train.fingerprint,
    }
    return [
        Cell("attacks", {"attack": ATTACK, "norm": norm, "eps": list(options.eps[norm]), **shared})
        for norm in _norms(options)
    ]


def forwards(cell: Cell, subject: Subject) -> float:
    """No image is ever done, so it costs all steps at each eps."""
    params, test = cell.params, len(subject.data.test)
    images = min(test, params["images"] or test)
    return float(3 * images * len(params["eps"]) * params["steps"] * params["restarts"])


def measure(cell: Cell, subject: Subject) -> Result:
    """PGD that maximises the relative distance ||moved - clean|| / ||clean|| of the global representation.

    It needs neither labels nor a head: the natural attack on a self-supervised network. Reported by eps are the
    distance moved and the cosine between the attacked and the clean representation (means over images), and, where
    there is a training split, the accuracy of a linear probe and of kNN on the attacked representation.
    """
    split, readers = attacked_split(subject, cell.params), _readers(subject)
    found = [_Displaced.of(part) for part in zip(*_attacked(cell.params, subject, split, readers), strict=True)]
    place = {"norm": cell.params["norm"]}

    def verdicts() -> Iterator[tuple[dict[str, Any], Bools]]:
        for r, reader in enumerate(readers):
            stands = np.logical_and.accumulate([level.right[r] for level in found])  # once broken, always broken
            for level, right in zip(found, stands, strict=True):
                yield {"attack": f"{ATTACK}:{reader}", **place, "eps": level.eps}, right

    result = Result.of_verdicts("robust_accuracy", found[0].ids, verdicts())
    for level in found:
        for metric, values in (("moved", level.moved), ("cosine", level.cosine)):
            mean = spread(values)
            condition = {"attack": ATTACK, **place, "eps": level.eps}
            result.measurements.append(Measurement(metric, mean.mean, mean.n, mean.low, mean.high, condition))
    result.notes += bounded_note(split, subject)
    if not readers:
        result.notes.append("no training split: distances only, no probe or kNN on the attacked representation")
    return result


def _norms(options: AttacksOptions) -> tuple[str, ...]:
    return tuple(dict.fromkeys(norm for attack, norm in options.attacks if attack == "pgd"))


@dataclass(frozen=True)
class _Displaced:
    """What one eps did to N images, or to a batch of them."""

    eps: float
    ids: Any  # int64 (N,)
    moved: Any  # float (N,), relative distance
    cosine: Any  # float (N,)
    right: Any  # bool (R, N), by reader

    @classmethod
    def of(cls, batches: tuple[_Displaced, ...]) -> _Displaced:
        columns = ((getattr(b, name) for b in batches) for name in ("ids", "moved", "cosine", "right"))
        return cls(batches[0].eps, *(np.concatenate(list(column), axis=-1) for column in columns))


def _attacked(
    params: dict[str, Any], subject: Subject, split: Split, readers: dict[str, Reader]
) -> Iterator[list[_Displaced]]:
    """What each batch shows without an attack and at each eps, the farthest pixels so far kept as eps rises."""
    model, size = subject.model, subject.compute.batch_size
    with torch.inference_mode(False):
        encoder = model.encoder().to(subject.compute.device).eval()
    options = {name: params[name] for name in ("norm", "steps", "step_size", "restarts", "seed")}
    for batch in subject.batches(split, batch_size=CHUNK):
        pixels = to_float(batch.images)
        clean = _encode(encoder, pixels, size)
        farthest, distance = pixels, clean.new_zeros(len(clean))

        def look(eps: float, moved: Tensor, batch: Any = batch, clean: Tensor = clean) -> _Displaced:
            right = [(read(moved) == batch.labels).cpu().numpy() for read in readers.values()]
            length = torch.linalg.vector_norm(moved - clean, dim=1) / torch.linalg.vector_norm(clean, dim=1)
            cosine = torch.cosine_similarity(moved, clean)
            rows = np.array(right, dtype=bool).reshape(len(readers), len(clean))
            return _Displaced(eps, batch.ids.cpu().numpy(), length.cpu().numpy(), cosine.cpu().numpy(), rows)

        found = [look(0.0, clean)]
        for eps in params["eps"]:
            # one eps at a time: of the last of its eps the attack has the pixels, of others it would compute them anew
            result = attacks.representation(encoder, pixels, eps, batch.ids, batch_size=size, **options)
            farther = result.distance[0] > distance
            distance = torch.where(farther, result.distance[0], distance)
            farthest = torch.where(farther.view(-1, 1, 1, 1), result.adversarial(0), farthest)
            found.append(look(eps, _encode(encoder, farthest, size)))
        yield found


@torch.no_grad()
def _encode(encoder: nn.Module, pixels: Tensor, batch_size: int) -> Tensor:
    starts = range(0, len(pixels), batch_size)
    return torch.cat([encoder(pixels[start : start + batch_size]).float() for start in starts])  # (B, D')


def _readers(subject: Subject) -> dict[str, Reader]:
    """What is read from a representation: a linear probe's class and kNN's; nothing without a training split."""
    train, device = subject.data.train, subject.compute.device
    if train is None:
        return {}
    head = fitted_probe(subject.model, train, subject.compute).module().to(device)
    bank = subject.features(train)
    vectors = bank.values["global"].to(device)  # once, for every eps
    k, classes = min(NEIGHBOURS, len(bank)), len(subject.data.classes)

    def neighbours(moved: Tensor) -> Tensor:
        votes = knn.predict(vectors, bank.labels, moved, num_classes=classes, k=k, device=device)
        return votes.argmax(1).to(moved.device)

    return {"probe": lambda moved: head(moved).argmax(1), "knn": neighbours}
