"""What run.json keeps of a model and of the images: enough to know them again."""

from __future__ import annotations

from typing import Any

from coss_eval.data.dataset import Dataset
from coss_eval.models.model import Model


def model_facts(model: Model) -> dict[str, Any]:
    """Name, identity, architecture and preprocessing with where they come from."""
    return {
        "name": model.name,
        **model.protocol(),
        "layout": model.layout,
        "normalisation_source": model.preprocessing.source,
        **{name: value for name, value in (("group", model.group), ("seed", model.seed)) if value is not None},
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
