"""From a model and labelled images to a classifier: the checkpoint's own head where it fits, else a linear probe."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from coss_eval.checkpoints.as_model import ModelLike, as_model
from coss_eval.data.as_dataset import DatasetLike, dataset_of
from coss_eval.data.dataset import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.models.choices import HeadChoice
from coss_eval.models.classifier import Classifier
from coss_eval.models.heads import resolve_head
from coss_eval.models.model import Model
from coss_eval.probes import cache as disk
from coss_eval.probes.behaviour import keep, recall
from coss_eval.probes.features import Features, extract_known, image_size, protocol
from coss_eval.probes.linear import STRENGTHS, LinearProbe, fit_probe, refit_probe
from coss_eval.probes.logistic import Rows
from coss_eval.runtime.code_identity import UNKNOWN
from coss_eval.runtime.device import Compute, resolve_device
from coss_eval.runtime.live import image_line

HELD_OUT = 0.1  # of the training images, to choose the strength on
FIXED_STRENGTH = 1.0  # where labels are too few to hold any out; near the best for one or two labels a class
TENSORS = ("weight", "bias", "mean", "std")  # of a LinearProbe
VERSION = 1  # to be raised when the same protocol comes to mean another probe


def fit_classifier(
    model: ModelLike,
    data: DatasetLike,
    *,
    head: HeadChoice | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 256,
    cache: bool = True,
    quiet: bool = False,
) -> Classifier:
    """Pixels in [0, 1] to the logits of ``data``'s classes, in eval mode on the device.

    ``model`` and ``data``: what ``as_model`` and ``as_dataset`` take. ``head``: "auto" takes the checkpoint's own head
    where its class names match, "own" insists on it, "probe" fits a linear probe on the training split; None is what
    the model was loaded with. ``origin`` of the result says which it was. The probe's strength is chosen on a tenth of
    the training images; the test split is never read. What takes some seconds says how far it is, unless ``quiet``.

    >>> import coss_eval as ce
    >>> digits = ce.load_dataset("digits")
    >>> classifier = ce.fit_classifier(ce.load_model("pixels:8"), digits, cache=False, device="cpu")
    >>> batch = next(digits.test.batches(batch_size=200))
    >>> right = classifier(batch.images / 255).argmax(1) == batch.labels
    >>> right.float().mean().item() > 0.9
    True
    """
    data = dataset_of(data)
    data.refuse_changed()
    with image_line(quiet=quiet) as on_images:
        compute = Compute(resolve_device(device), batch_size, cache, on_images)
        return known_classifier(as_model(model).identified(), data, compute, head=head, check_batches=True)


def known_classifier(
    model: Model,
    data: Dataset,
    compute: Compute,
    *,
    head: HeadChoice | None = None,
    check_batches: bool = False,
) -> Classifier:
    """``fit_classifier`` of a model whose identity was taken just now: nothing is hashed again."""
    decision = resolve_head(model, data.classes, head)
    if decision.use_own and model.head is not None:
        class_map = None if decision.class_map is None else torch.tensor(decision.class_map)
        classifier = Classifier(
            model.backbone, model.head, model.preprocessing, class_map=class_map, origin=decision.why
        )
    elif data.train is None:
        raise UsageError(
            f"{data.name} has no training split to fit a probe on, and its classes need one ({decision.why}); "
            "give a dataset with train/ and test/ folders, or a checkpoint whose head has these classes"
        )
    else:
        probe = fitted_probe(model, data.train, compute, check_batches=check_batches)
        classifier = Classifier(
            model.backbone, probe.module(), model.preprocessing, origin=probe.describe(), fitted=True
        )
    return classifier.to(compute.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def fitted_probe(model: Model, train: Split, compute: Compute, *, check_batches: bool = False) -> LinearProbe:
    """The linear probe on the global representation of ``train``; kept in the cache, as its features are.

    The model's identity is taken as it stands: after changing weights in place, give ``model.identified()``.
    """
    cache = compute.cache and model.code != UNKNOWN
    model = model if model.batch_size is None else replace(model, batch_size=compute.batch_size)
    name = disk.key("probe", _probe_protocol(model, train))
    network = model, image_size(model, train), compute.device
    probe = _load(name, *network) if cache else None
    if probe is None or (probe.at_the_end and len(probe.path) == len(STRENGTHS)):  # stored before grids were widened
        features = extract_known(model, train, compute, check_batches=check_batches)
        if compute.on_images is not None:
            compute.on_images(f"fitting a linear probe of {model.name}", 0, len(features))
        probe = choose_probe(features, train, device=compute.device)
        if cache:
            _save(name, probe, *network)
    return probe


def probe_beside(
    model: Model,
    train: Split,
    compute: Compute,
    factor: float,
) -> LinearProbe:
    """``fitted_probe`` at ``factor`` times its strength: how much of a result is the probe's and not the network's."""
    cache = compute.cache and model.code != UNKNOWN
    model = model if model.batch_size is None else replace(model, batch_size=compute.batch_size)
    name = disk.key("probe", {**_probe_protocol(model, train), "factor": factor})
    network = model, image_size(model, train), compute.device
    probe = _load(name, *network) if cache else None
    chosen = fitted_probe(model, train, compute)
    strength = factor * chosen.strength
    if probe is None or not math.isclose(probe.strength, strength):
        features = extract_known(model, train, compute)
        probe = refit_probe(chosen, features.values["global"], features.labels, strength, device=compute.device)
        if cache:
            _save(name, probe, *network)
    return probe


def _probe_protocol(model: Model, train: Split) -> dict[str, object]:
    """All that the probe of ``fitted_probe`` depends on."""
    return {
        "features": protocol(model, train),
        "classes": len(train.classes),
        "strengths": STRENGTHS,
        "held_out": HELD_OUT,
        "version": VERSION,
    }


def few_label_probe(
    features: Features,
    train: Split,
    fraction: float,
    *,
    seed: int = 0,
    site: str = "global",
    device: str | torch.device = "auto",
) -> LinearProbe:
    """The probe from a class-balanced ``fraction`` (0.01, 0.1) of ``train``'s labels; no other label is looked at.

    ``features`` are those of all of ``train``. The held-out images are among the labelled ones, too.
    """
    return choose_probe(features, train.few_labels(fraction, seed), site=site, device=device)


def choose_probe(
    features: Features, labelled: Split, *, site: str = "global", device: str | torch.device = "auto"
) -> LinearProbe:
    """The probe fitted on the images of ``labelled``, its strength chosen on a tenth of them held out.

    With fewer than two labels a class there is nothing to hold out: the strength is FIXED_STRENGTH then, and
    ``LinearProbe.describe`` says that it is fixed.
    """
    num_classes = len(labelled.classes)

    def part(split: Split) -> tuple[Rows, Tensor]:
        places = torch.from_numpy(np.flatnonzero(np.isin(features.ids.numpy(), split.ids)))
        return Rows((features.values[site], places)), features.labels[places]

    target = resolve_device(device)
    if len(labelled) < 2 * len(np.unique(labelled.labels)):
        return fit_probe(*part(labelled), num_classes=num_classes, strengths=[FIXED_STRENGTH], device=target)
    fit, select = labelled.holdout(HELD_OUT)
    return fit_probe(*part(fit), num_classes=num_classes, select=part(select), device=target)


def _save(name: str, probe: LinearProbe, model: Model, size: tuple[int, int], device: torch.device) -> None:
    tensors = {entry: getattr(probe, entry).numpy() for entry in TENSORS}
    path = np.array(list(probe.path.items()), np.float64).reshape(-1, 2)
    keep(name, {**tensors, "strength": np.array(probe.strength), "path": path}, model, size, device)


def _load(name: str, model: Model, size: tuple[int, int], device: torch.device) -> LinearProbe | None:
    found = recall(name, [*TENSORS, "strength", "path"], model, size, device)
    if found is None:
        return None
    weight, bias, mean, std = (torch.from_numpy(found[entry]) for entry in TENSORS)
    return LinearProbe(weight, bias, mean, std, float(found["strength"]), dict(found["path"].tolist()))
