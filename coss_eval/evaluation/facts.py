"""What run.json keeps of a model and of the images, enough to know them again, and what is known of a model by it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossError
from coss_eval.models.architecture import Architecture
from coss_eval.models.model import Model
from coss_eval.randomness import seeded_init
from coss_eval.receptive_field.theoretical import location_fields
from coss_eval.reports.relate import FamilyBy, LocationFacts, Relation
from coss_eval.reports.relate import relate as of_folders


def model_facts(model: Model) -> dict[str, Any]:
    """Name, identity, architecture and preprocessing with where they come from."""
    return {
        "name": model.name,
        **model.protocol(),
        "layout": model.layout,
        "normalisation_source": model.preprocessing.source,
        **model.training(),
        "report": None if model.report is None else model.report.as_dict(),
    }


def data_facts(data: Dataset) -> dict[str, Any]:
    """Name and splits; the training split's fingerprint where something has asked for it."""
    train = data.train
    return {
        "name": data.name,
        "classes": len(data.classes),
        "test": {"n": len(data.test), "fingerprint": data.test.fingerprint, "limit": data.test.limit},
        "train": None if train is None else {"n": len(train), "fingerprint": train.known_fingerprint},
    }


def relate(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    x: str = "redundancy",
    y: str = "corruptions",
    *,
    family: FamilyBy = "arch",
) -> Relation:
    """One headline score against another over the models in results folders: ``.table()``, ``.ranks()`` (Spearman's
    coefficients within families, with intervals over models), ``.plot()`` and ``.write(out)``.

    ``x`` and ``y`` name columns of the headline ("kept, channels masked") or tasks, whose first column it then is. A
    folder without cells stands for all results folders inside it. ``family``: "arch", "folder" or "none", all models in
    one. Weights found in several folders are one model. Raises UsageError for an unknown score and where fewer than
    three models have both.
    """
    several = [folders] if isinstance(folders, str | os.PathLike) else [*folders]
    return of_folders(several, x, y, family=family, locations_of=locations_of)


def locations_of(model: Mapping[str, Any], side: int) -> LocationFacts | None:
    """The locations before pooling of a network built by what its protocol says; None where that does not tell.

    No code is run that is not the package's or its libraries': a person's own factory is left alone.
    """
    options = {field.name: model[field.name] for field in fields(Architecture) if field.name in model}
    if not side or "arch" not in options:
        return None
    try:
        architecture = Architecture(**options)
        if architecture.own:
            return None
        with seeded_init(0), torch.no_grad():
            backbone = architecture.backbone().eval()
            number = backbone.represent(torch.zeros(1, 3, side, side)).local.shape[1]
            return LocationFacts(location_fields(backbone, "prepool", side).size, number)
    except CossError:  # no network's name, or one whose fields are not known
        return None
