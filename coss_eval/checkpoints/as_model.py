"""Whatever a person has in hand as a model: a Model, a name, a path, or a plain network, to a Model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from coss_eval.checkpoints.load import load
from coss_eval.checkpoints.matching import head_line, refuse_non_finite
from coss_eval.checkpoints.options import LoadOptions
from coss_eval.checkpoints.preprocessing import of_own_code
from coss_eval.errors import UsageError
from coss_eval.models import zoo
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import HeadChoice
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import KeyReport, Model
from coss_eval.models.wrap import wrap

ModelLike = str | os.PathLike[str] | Model | nn.Module
"""What every function that measures a model takes."""


def as_model(
    given: ModelLike,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    img_size: int | None = None,
    local: str | None = None,
    global_: str | None = None,
    head: HeadChoice = "auto",
) -> Model:
    """A Model of a network as it is in memory; of a path or a name as ``load_model`` has it; a Model is itself.

    The network is copied as it is now, to the CPU, in float32, eval mode and without gradients: training it further
    changes no number of the copy. It takes pixels (B, 3, H, W) normalised by ``mean`` and ``std`` (ImageNet's are
    ASSUMED where nobody says them) and returns logits, or a representation. ``local``, ``global_``: its modules whose
    outputs are the map before pooling and the global representation, where it is not to be taken apart by itself.
    ``head``: "own" says that its outputs are the dataset's classes in their order, "auto" and "probe" fit a probe, as a
    network in memory names no classes. Raises UsageError for what is no network, takes no image, or gives no tensor.

    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    >>> model = as_model(network, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), name="mine")
    >>> model.name, model.backbone.dim
    ('mine', 4)
    """
    options = LoadOptions(
        mean=None if mean is None else tuple(mean),  # type: ignore[arg-type]  # of three, as it checks
        std=None if std is None else tuple(std),  # type: ignore[arg-type]
        img_size=img_size,
        local=local,
        global_=global_,
        head=head,
    )
    model = _model(given, options)
    return model if name is None else replace(model, name=name)


def _model(given: ModelLike, options: LoadOptions) -> Model:
    if isinstance(given, Model):
        if options != LoadOptions():
            raise UsageError(f"{given.name} is a Model already: say mean, std, head, ... where it is loaded or made")
        return given
    if isinstance(given, nn.Module):
        return _of_network(given, options)
    if isinstance(given, str | os.PathLike):
        return load(given if isinstance(given, str) else Path(given), options)
    if isinstance(given, dict):
        raise UsageError("a state dict has no network: load it into yours, or save it and give its path to load_model")
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    made = f": {kind} is a class, give one of it, {kind}(...)" if isinstance(given, type) else ""
    raise UsageError(f"a model is a path, a name, a Model or a torch.nn.Module, not {kind}{made}")


def _of_network(network: nn.Module, options: LoadOptions) -> Model:
    """A plain network, copied, taken apart, and with what it says itself of its normalisation."""
    own = _copied(_bare(network))
    kind, classes = type(own).__name__, {type(module) for module in own.modules()}
    known = _known(own)
    if isinstance(own, Backbone):
        backbone, own_head = own, None
    else:
        backbone, own_head = wrap(own, img_size=options.img_size, local=options.local, global_=options.global_)
    backbone.made_of = tuple(classes)
    known = of_own_code(backbone, known, asked=options.mean is not None)
    preprocessing = options.preprocessing(replace(known, img_size=backbone.img_size or known.img_size))
    refuse_non_finite(backbone, own_head, kind)
    head = None if options.head == "probe" else own_head
    report = KeyReport(
        layout="a network in memory",
        branch=None,
        branches=(),
        arch=kind,
        inferred=(),
        matched=len(backbone.state_dict()),
        head=head_line("", head),
        notes=(backbone.note,) if backbone.note else (),
    )
    return Model(
        name=kind,
        arch=_arch(kind, options),
        backbone=backbone,
        head=head,
        classes=None,
        preprocessing=preprocessing,
        sha256="",
        layout="module",
        report=report,
        head_choice=options.head,
    ).identified()


def _arch(kind: str, options: LoadOptions) -> str:
    """What stands in every key for the network's structure, beside its weights and its code: also where it was cut."""
    cut = [f"{place} {module}" for place, module in (("local", options.local), ("global", options.global_)) if module]
    return " ".join([kind, *cut])


def _bare(network: nn.Module) -> nn.Module:
    """The network inside what trains or compiles it."""
    inner: Any = network
    while True:
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        else:
            return inner  # type: ignore[no-any-return]


def _copied(network: nn.Module) -> nn.Module:
    if isinstance(network, torch.jit.ScriptModule):
        raise UsageError("a TorchScript network cannot be taken apart: give the network that it was made from")
    if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
        raise UsageError(f"{type(network).__name__} has lazy layers without weights: call it once on a batch of images")
    try:
        copied = copy.deepcopy(network)
    except Exception as error:  # a network's own parts may refuse in any way
        reason = str(error).partition("\n")[0]
        kind = type(network).__name__
        raise UsageError(
            f"{kind} cannot be copied ({reason}): save its weights and use load_model(..., arch=)"
        ) from error
    return copied.float().cpu().eval().requires_grad_(False)


def _known(network: Any) -> Preprocessing:
    """What a timm network says of its input where it still has the classes that it was published with, or none.

    One made for other classes was trained on other images, of which its pretrained_cfg says nothing.
    """
    shown, classes = getattr(network, "pretrained_cfg", None), getattr(network, "num_classes", None)
    needed = {"mean", "std", "input_size", "crop_pct", "interpolation", "num_classes"}
    if isinstance(shown, dict) and needed <= shown.keys() and classes in (0, shown["num_classes"]):
        return zoo.timm_preprocessing(shown, "the network's pretrained_cfg")
    return Preprocessing()
