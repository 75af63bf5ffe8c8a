"""Our own files: safetensors whose metadata says all that load_model needs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.checkpoints.matching import (
    copy_into,
    head_line,
    linear_at,
    refuse_larger,
    refuse_unless_complete,
    slots_of,
)
from coss_eval.checkpoints.options import LoadOptions
from coss_eval.errors import CossError, UsageError
from coss_eval.models.architecture import Architecture
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import KeyReport, Model
from coss_eval.models.rf_resnet import PRESETS
from coss_eval.runtime.disk import write_atomically

TRAINING: dict[str, type] = {"group": str, "seed": int, "recipe": str}  # what Model.training gives
CONFIG = "coss_eval"  # the entry of the metadata that holds the config, as JSON


def save_model(model: Model, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model as safetensors that load_model reads without a flag: weights, classes, normalisation, architecture.

    ``dtype`` rounds what is no whole number (bfloat16 halves the file); the model that is read back is float32.
    Written whole or not at all. Raises CossError for a head that is not one linear layer, or an unwritable path.
    """
    if model.architecture is None:
        raise CossError(f"{model.name}: how to build {model.arch} is not known, so a file of it could not be read back")
    if model.head is not None and not isinstance(model.head, nn.Linear):
        raise CossError(f"{model.name}: only a linear head can be saved, not {type(model.head).__name__}")
    tensors = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    if model.head is not None:
        tensors |= {f"head.{key}": value for key, value in model.head.state_dict().items()}
    config = {
        "architecture": asdict(model.architecture),
        "classes": model.classes,
        "preprocessing": model.preprocessing.protocol(),
        "name": model.name,
        **model.training(),
    }
    content = safetensors.torch.save(
        {key: _rounded(value.detach().cpu().clone().contiguous(), dtype) for key, value in tensors.items()},
        {CONFIG: json.dumps(config)},
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), content)
    except OSError as error:
        raise CossError(f"cannot write {path}: {error.strerror}; choose another folder") from error


def _rounded(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def own_model(name: str, content: dict[str, Any], config: str, options: LoadOptions) -> Model:
    """The Model of a file that save_model wrote; its hash is not yet computed."""
    try:
        fields = json.loads(config)
        architecture = Architecture(**fields["architecture"])
        classes = tuple(map(str, fields["classes"])) if fields["classes"] else None
        stored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["preprocessing"].items()}
        preprocessing = Preprocessing(**stored, said_by="checkpoint")
        training: dict[str, Any] = {name: kind(fields[name]) for name, kind in TRAINING.items() if name in fields}
    except (UsageError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CossError(f"its {CONFIG} metadata cannot be read ({error}); write it again with save_model") from error
    _agree(architecture, options)
    repooled = options.pooling != "own" and options.pooling != architecture.pooling  # the head was made for the other
    architecture = replace(architecture, pooling=options.pooling) if repooled else architecture
    if options.local or options.global_:
        architecture = replace(architecture, local=options.local, global_=options.global_)
    state = flatten(content)
    refuse_larger(architecture, state.values())
    backbone = architecture.backbone(seed=0)
    if backbone.img_size is not None and options.img_size not in (None, backbone.img_size):
        raise UsageError(f"it takes images of side {backbone.img_size} only; leave --img-size {options.img_size} out")
    weights = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    fit = copy_into(slots_of(backbone), backbone, weights)
    refuse_unless_complete(fit, architecture.arch, (), allow_partial=options.allow_partial)
    head = None if repooled else linear_at(state, "head.", backbone.dim)
    report = KeyReport(
        layout="coss-eval",
        branch=None,
        branches=(),
        arch=architecture.arch,
        inferred=(),
        matched=len(fit.matched),
        missing=fit.missing + fit.misshapen,
        head=head_line("head", head),
    )
    return Model(
        name=name,
        arch=architecture.arch,
        backbone=backbone,
        head=head,
        classes=classes if head is not None and classes and len(classes) == head.out_features else None,
        preprocessing=options.preprocessing(preprocessing),
        sha256="",
        layout="coss-eval",
        report=report,
        architecture=architecture,
        **training,
    )


def _agree(architecture: Architecture, options: LoadOptions) -> None:
    if options.file_layout is not None:
        raise UsageError("it has the layout of save_model; leave --file-layout out")
    arch, width = architecture.arch, architecture.width
    wanted = options.arch and options.arch.removeprefix("torchvision:")
    if architecture.own and wanted != arch:
        raise UsageError(f"its network is made by {arch}, and a file runs no code: give --arch {arch} to allow it")
    if wanted not in (None, arch):
        raise UsageError(f"it says that it is a {arch}; leave --arch out")
    stems = {architecture.stem, PRESETS[arch].stem if arch in PRESETS else architecture.stem}
    if options.stem is not None and options.stem not in stems:
        raise UsageError(f"it says that its stem is {' or '.join(sorted(stems))}; leave --stem {options.stem} out")
    if options.width not in (None, width):
        raise UsageError(f"it says that its width is {width}; leave --width {options.width} out")
    if options.weights not in (None, "student", "online"):
        raise UsageError(f"no branch {options.weights!r}: it holds one network; leave --weights out")
