"""Whether a robust accuracy may be believed: signs of masked gradients, and how much of it is the probe's strength."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coss_eval.attacks import Verdicts, masking_flags, usage_flags
from coss_eval.attacks.norms import NORMS
from coss_eval.data.batches import Batch
from coss_eval.data.split import Split
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.probes import probe_beside
from coss_eval.store import Measurement
from coss_eval.tasks.attacks.calls import CHUNK, attack_of, run
from coss_eval.tasks.task import Subject, proportion

QUERIES = 300  # of the square attack, which no gradient can mislead
STRENGTH_STEP = 10**0.5  # of the grid that a probe's strength is chosen from


def masking_lines(params: dict[str, Any], subject: Subject, few: Split, ids: Tensor, verdicts: Verdicts) -> list[str]:
    """A line for each flag, or one that says that none was raised; ``few`` are some of the attacked images (ids)."""
    batch = _whole(subject, few)
    pixels, size = to_float(batch.images), subject.compute.batch_size
    flags = usage_flags(subject.classifier, pixels, batch_size=size)
    checks = "the network's mode and outputs"
    if attack_of(params).iterated and params["norm"] in NORMS:
        rows = _places(batch.ids, ids)
        flags += masking_flags(
            subject.classifier,
            pixels,
            batch.labels,
            batch.ids,
            verdicts.among(rows),
            steps=QUERIES,
            seed=params["seed"],
            batch_size=size,
        )
        square = f", square with {QUERIES} queries" if params["norm"] == "linf" else ""
        checks += f", zero gradients, FGSM{square}, PGD without a bound"
    name = f"{params['attack']}, {params['norm']}"
    if not flags:
        return [f"masking flags, {name}: none raised ({checks}; n = {len(few)})"]
    return [f"MASKING FLAG, {name}: {flag.name}: {flag.message} (n = {len(few)})" for flag in flags]


def strength_sensitivity(params: dict[str, Any], subject: Subject, few: Split) -> list[Measurement]:
    """Accuracy without and under the attack at the middle eps, with a probe one step weaker, the chosen, one stronger.

    A representation's robustness should outlast such a step; where it does not, the number is the probe's. Three runs
    on all of ``few`` would cost more than the flags do: half of them are used.
    """
    few = few.limited(-(-len(few) // 2), params["seed"])
    train = subject.data.train
    assert train is not None  # the probe was fitted on it
    middle = params["eps"][(len(params["eps"]) - 1) // 2]
    found = []
    for name, factor in (("chosen / 3.2", 1 / STRENGTH_STEP), ("chosen", 1.0), ("chosen x 3.2", STRENGTH_STEP)):
        classifier = subject.classifier
        if factor != 1:
            classifier = _with_head(subject, probe_beside(subject.model, train, subject.compute, factor).module())
        batches = subject.batches(few, batch_size=CHUNK)
        _, verdicts = run(params | {"eps": [middle]}, classifier, batches, subject.compute.batch_size)
        condition = {"attack": params["attack"], "norm": params["norm"], "strength": name}
        for eps, stands in ((0.0, verdicts.clean), (middle, verdicts.robust[0])):
            metric = "robust_accuracy_by_strength"
            found.append(proportion(metric, stands.cpu().numpy(), **condition, eps=eps))
    return found


def _with_head(subject: Subject, head: torch.nn.Module) -> Classifier:
    model = subject.model
    with torch.inference_mode(False):
        return Classifier(model.backbone, head, model.preprocessing).to(subject.compute.device).eval()


def _whole(subject: Subject, split: Split) -> Batch:
    """All images of a small split at once."""
    batches = list(subject.batches(split, batch_size=CHUNK))
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def _places(wanted: Tensor, ids: Tensor) -> Tensor:
    """Where each of ``wanted`` (n,) stands in ``ids``, int64 (n,)."""
    known, order = ids.sort()
    return order[torch.searchsorted(known, wanted)]
