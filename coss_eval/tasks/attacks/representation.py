"""Attacks on the representation itself: how far a small perturbation moves it, and what can still be read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks.inputs import check_count, check_eps, check_norm, check_step_size
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.models.classifier import to_float
from coss_eval.probes import extract_known, fitted_probe, knn
from coss_eval.statistics import spread
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.attacks.calls import CHUNK
from coss_eval.tasks.attacks.task import L2_EPS, LINF_EPS, attacked_split
from coss_eval.tasks.task import Bools, Result, Subject, Task

ATTACK = "representation"
NEIGHBOURS = 20
Reader = Callable[[Tensor], Tensor]  # representations (B, D') to the classes they are taken for (B,)


@dataclass(frozen=True)
class RepresentationAttack(Task):
    """PGD that maximises the relative distance ||moved - clean|| / ||clean|| of the global representation.

    It needs neither labels nor a head: the natural attack on a self-supervised network. Reported by eps are the
    distance moved and the cosine between the attacked and the clean representation (means over images), and, where
    there is a training split, the accuracy of a linear probe and of kNN on the attacked representation. One cell a
    norm; no image is ever done, so it costs the full ``steps`` at each eps.
    """

    name: ClassVar[str] = "attacks"
    uses_head: ClassVar[bool] = False

    norms: tuple[str, ...] = ("linf", "l2")
    eps: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"linf": LINF_EPS, "l2": L2_EPS})
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    images: int | None = 1000

    def __post_init__(self) -> None:
        for norm in self.norms:
            check_norm(norm)
            check_eps(self.eps[norm], norm)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_step_size(self.step_size)

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        train = subject.data.train
        shared = {
            "images": self.images,
            "seed": seed,
            "steps": self.steps,
            "step_size": self.step_size,
            "restarts": self.restarts,
            "train": None if train is None else train.fingerprint,
        }
        return [
            Cell(self.name, {"attack": ATTACK, "norm": norm, "eps": list(self.eps[norm]), **shared})
            for norm in self.norms
        ]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        images = min(len(subject.data.test), cell.params["images"] or len(subject.data.test))
        return 3.0 * images * len(cell.params["eps"]) * self.steps * self.restarts

    def measure(self, cell: Cell, subject: Subject) -> Result:
        split, readers = attacked_split(subject, cell.params), _readers(subject)
        found = [_Found.of(part) for part in zip(*_attacked(cell.params, subject, split, readers), strict=True)]
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
        if len(split) < len(subject.data.test):
            result.notes.append(
                f"attacks use {len(split)} of {len(subject.data.test)} test images, balanced over classes"
            )
        if not readers:
            result.notes.append("no training split: distances only, no probe or kNN on the attacked representation")
        return result


def representation_attack(
    pairs: Sequence[tuple[str, str]], *, steps: int | None, loss: str, backend: str, **options: Any
) -> RepresentationAttack:
    """The task for the command line's flags: the norms of its PGD attacks; a UsageError for flags that do not fit."""
    others = sorted({attack for attack, _ in pairs} - {"pgd", "fgsm"})
    if others or loss != "auto" or backend != "native":
        given = f"--attack {others[0]}" if others else f"--loss {loss}" if loss != "auto" else f"--backend {backend}"
        raise UsageError(f"--target representation is attacked by native PGD along its distance, got {given}")
    norms = tuple(dict.fromkeys(norm for attack, norm in pairs if attack == "pgd"))
    return RepresentationAttack(norms, steps=RepresentationAttack.steps if steps is None else steps, **options)


@dataclass(frozen=True)
class _Found:
    """What one eps did to N images, or to a batch of them."""

    eps: float
    ids: Any  # int64 (N,)
    moved: Any  # float (N,), relative distance
    cosine: Any  # float (N,)
    right: Any  # bool (R, N), by reader

    @classmethod
    def of(cls, batches: tuple[_Found, ...]) -> _Found:
        columns = ((getattr(b, name) for b in batches) for name in ("ids", "moved", "cosine", "right"))
        return cls(batches[0].eps, *(np.concatenate(list(column), axis=-1) for column in columns))


def _attacked(
    params: dict[str, Any], subject: Subject, split: Split, readers: dict[str, Reader]
) -> Iterator[list[_Found]]:
    """What each batch shows without an attack and at each eps, the farthest pixels so far kept as eps rises."""
    model, size = subject.model, subject.settings.batch_size
    with torch.inference_mode(False):
        encoder = model.encoder().to(subject.settings.device).eval()
    options = {name: params[name] for name in ("norm", "steps", "step_size", "restarts", "seed")}
    for batch in subject.batches(split, batch_size=CHUNK):
        pixels = to_float(batch.images)
        clean = _encode(encoder, pixels, size)
        farthest, distance = pixels, clean.new_zeros(len(clean))

        def look(eps: float, moved: Tensor, batch: Any = batch, clean: Tensor = clean) -> _Found:
            right = [(read(moved) == batch.labels).cpu().numpy() for read in readers.values()]
            length = torch.linalg.vector_norm(moved - clean, dim=1) / torch.linalg.vector_norm(clean, dim=1)
            cosine = torch.cosine_similarity(moved, clean)
            rows = np.array(right, dtype=bool).reshape(len(readers), len(clean))
            return _Found(eps, batch.ids.cpu().numpy(), length.cpu().numpy(), cosine.cpu().numpy(), rows)

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
    train, settings = subject.data.train, subject.settings
    if train is None:
        return {}
    options: dict[str, Any] = {"device": settings.device, "batch_size": settings.batch_size, "cache": settings.cache}
    head = fitted_probe(subject.model, train, **options).module().to(settings.device)
    bank = extract_known(subject.model, train, **options)
    vectors = bank.values["global"].to(settings.device)  # once, for every eps
    k, classes = min(NEIGHBOURS, len(bank)), len(subject.data.classes)

    def neighbours(moved: Tensor) -> Tensor:
        votes = knn.predict(vectors, bank.labels, moved, num_classes=classes, k=k, device=settings.device)
        return votes.argmax(1).to(moved.device)

    return {"probe": lambda moved: head(moved).argmax(1), "knn": neighbours}
