"""coss-eval: how robust is this visual representation, and why?

The public surface, resolved on first use: importing the package imports neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coss_eval import attacks as attacks
    from coss_eval import checkpoints as checkpoints
    from coss_eval import corruptions as corruptions
    from coss_eval import data as data
    from coss_eval import errors as errors
    from coss_eval import evaluation as evaluation
    from coss_eval import internal as internal
    from coss_eval import models as models
    from coss_eval import probes as probes
    from coss_eval import randomness as randomness
    from coss_eval import receptive_field as receptive_field
    from coss_eval import redundancy as redundancy
    from coss_eval import reports as reports
    from coss_eval import similarity as similarity
    from coss_eval import statistics as statistics
    from coss_eval import store as store
    from coss_eval import sweeps as sweeps
    from coss_eval import tasks as tasks
    from coss_eval import training as training
    from coss_eval import views as views
    from coss_eval.checkpoints.as_model import as_model as as_model
    from coss_eval.checkpoints.load import load_model as load_model
    from coss_eval.data.as_dataset import as_dataset as as_dataset
    from coss_eval.data.open import load_dataset as load_dataset
    from coss_eval.evaluation import Run as Run
    from coss_eval.evaluation import compare as compare
    from coss_eval.evaluation import evaluate as evaluate
    from coss_eval.evaluation import relate as relate
    from coss_eval.evaluation.extraction import write_features as write_features
    from coss_eval.evaluation.similarity import similarities as similarities
    from coss_eval.probes import fit_classifier as fit_classifier
    from coss_eval.probes.features import extract as extract
    from coss_eval.training.loop import train as train

__version__ = "0.1.0"

_HOME = {
    "as_dataset": "coss_eval.data.as_dataset",
    "as_model": "coss_eval.checkpoints.as_model",
    "load_dataset": "coss_eval.data.open",
    "load_model": "coss_eval.checkpoints.load",
    "fit_classifier": "coss_eval.probes",
    "extract": "coss_eval.probes.features",
    "evaluate": "coss_eval.evaluation",
    "compare": "coss_eval.evaluation",
    "relate": "coss_eval.evaluation",
    "Run": "coss_eval.evaluation",
    "similarities": "coss_eval.evaluation.similarity",
    "train": "coss_eval.training.loop",
    "write_features": "coss_eval.evaluation.extraction",
}

# what the command line would print, they give as warnings
_SPEAKING = ("as_model", "load_model", "evaluate", "similarities", "train", "write_features")

_ROOMS = (
    "attacks",
    "checkpoints",
    "corruptions",
    "data",
    "errors",
    "evaluation",
    "internal",
    "models",
    "probes",
    "randomness",
    "receptive_field",
    "redundancy",
    "reports",
    "similarity",
    "statistics",
    "store",
    "sweeps",
    "tasks",
    "training",
    "views",
)

__all__ = [
    "Run",
    "__version__",
    "as_dataset",
    "as_model",
    "compare",
    "evaluate",
    "extract",
    "fit_classifier",
    "load_dataset",
    "load_model",
    "relate",
    "similarities",
    "train",
    "write_features",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"coss_eval.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'coss_eval' has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    if name in _SPEAKING:
        from coss_eval._speaking import speaking

        found = speaking(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
