"""Any checkpoint file, or the name of a published network, to a Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coss_eval.checkpoints.files import METADATA, checkpoint_file, read_file
from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.checkpoints.foreign import Lookalike, foreign_model
from coss_eval.checkpoints.matching import head_line, refuse_larger, refuse_non_finite
from coss_eval.checkpoints.normalisation import normalisation_check as normalisation_check
from coss_eval.checkpoints.options import LoadOptions
from coss_eval.checkpoints.own_format import CONFIG, own_model
from coss_eval.checkpoints.own_format import save_model as save_model
from coss_eval.checkpoints.preprocessing import architecture_beside, of_own_code
from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.architecture import Architecture
from coss_eval.models.choices import HeadChoice, Interpolation, Pooling, Stem
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.families import PixelsBackbone
from coss_eval.models.model import KeyReport, Model, weights_sha256
from coss_eval.models.zoo import is_own, timm_names
from coss_eval.randomness import seeded_init
from coss_eval.runtime.remote import refuse_remote

GENERIC_NAMES = {"model", "checkpoint", "ckpt", "last", "best", "final", "model_best", "weights", "state_dict"}
ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)
"""What reading the shapes and config entries of a strange file can fail with."""
TRAINER_STATE = {"version", "epoch", "step", "objective", "optimizer", "config", "data"}  # keys of a run's last.pt


def load_model(
    source: str | Path,
    *,
    arch: str | None = None,
    stem: Stem | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: Interpolation | None = None,
    head: HeadChoice = "auto",
    weights: str | None = None,
    pooling: Pooling = "own",
    local: str | None = None,
    global_: str | None = None,
    allow_partial: bool = False,
    file_layout: str | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """A Model from a checkpoint file of any known layout, from "torchvision:NAME" or "timm:NAME", or "pixels:SIDE".

    ``arch``, ``stem``, ``width``: as zoo.network has them ("package.module:factory" for a network of one's own); None
    reads them off the tensors' shapes. ``mean``, ``std``: three numbers, alike for a grey network. ``weights``: the
    branch of the file (student, teacher, online, target), or which published weights. ``head``: how heads.resolve_head
    will treat the file's classifier; "probe" drops it.
    ``local`` and ``global_`` name the modules whose outputs are the representations, where the network is not to be
    taken apart by itself.
    ``file_layout``: how the file is laid out, where that is not recognised: a row's name (see layouts.LAYOUTS), or
    "package.module:LAYOUT". ``allow_partial`` accepts a file that leaves parts of the backbone at random (drawn from
    seed 0). The model comes in eval mode, without gradients for its parameters; nothing in the file is run, and torch's
    generator is left as it was. Raises UsageError and CossError with one line that names the flag that would help.

    >>> import tempfile, coss_eval as ce
    >>> path = Path(tempfile.mkdtemp()) / "mine.safetensors"
    >>> save_model(make_model("resnet18", stem="cifar", width=8), path)
    >>> model = ce.load_model(path, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> model.arch, model.backbone.dim, model.preprocessing.std
    ('resnet18', 64, (0.25, 0.25, 0.25))
    """
    options = LoadOptions(
        arch=arch,
        stem=stem,
        width=width,
        mean=None if mean is None else tuple(mean),  # type: ignore[arg-type]  # of three, as it checks
        std=None if std is None else tuple(std),  # type: ignore[arg-type]
        img_size=img_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        head=head,
        weights=weights,
        pooling=pooling,
        local=local,
        global_=global_,
        allow_partial=allow_partial,
        file_layout=file_layout,
    )
    return load(source, options, device)


def load(source: str | Path, options: LoadOptions, device: torch.device | str = "cpu") -> Model:
    """``load_model`` with its options as one object."""
    refuse_remote(str(source))
    if str(source).startswith(("torchvision:", "timm:")):
        model = _published(str(source), options)
    elif str(source).startswith("pixels:"):
        model = _pixels(str(source), options)
    else:
        model = _from_file(Path(source).expanduser(), options)
    refuse_non_finite(model.backbone, model.head, str(source))
    head = None if options.head == "probe" else model.head
    for module in (model.backbone, head):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    classes = model.classes if head is not None else None
    return replace(model, head=head, classes=classes, head_choice=options.head).identified()


def make_model(
    arch: str,
    *,
    stem: Stem = "imagenet",
    width: int = 64,
    img_size: int | None = None,
    pooling: Pooling = "own",
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Model:
    """A Model with random weights drawn from ``seed``, with a linear head for ``classes`` where they are given."""
    architecture = Architecture(arch, stem, width, img_size, pooling)
    with seeded_init(seed):
        backbone = architecture.backbone()
        head = nn.Linear(backbone.dim, len(classes)) if classes is not None else None
    for module in (backbone, head):
        if module is not None:
            module.eval().requires_grad_(False)
    known = preprocessing or Preprocessing()
    if architecture.own:
        known = of_own_code(backbone, known, asked=known.asked)
    return Model(
        name=name or f"untrained {arch} (seed {seed})",
        arch=arch,
        backbone=backbone,
        head=head,
        classes=tuple(classes) if classes is not None else None,
        preprocessing=replace(known, img_size=known.img_size or backbone.img_size),
        sha256=weights_sha256(backbone, head),
        layout="untrained",
        architecture=architecture,
    )


def _pixels(spec: str, options: LoadOptions) -> Model:
    """Raw pixels at a side, "pixels:32", as if they were a representation."""
    side = spec.partition(":")[2]
    if not side.isdecimal() or not 0 < int(side) <= 512:
        raise UsageError(f"pixels:SIDE takes a side from 1 to 512 px, such as pixels:32, not {spec!r}")
    return Model(
        name=f"raw pixels ({side} px)",
        arch=spec,
        backbone=PixelsBackbone(int(side)),
        head=None,
        classes=None,
        preprocessing=options.preprocessing(Preprocessing(img_size=int(side))),
        sha256="",
        layout="pixels",
    )


def _published(spec: str, options: LoadOptions) -> Model:
    """A torchvision or timm network; arch, stem and branch names are meant for files and say nothing here."""
    source, _, name = spec.partition(":")
    branch = options.weights in ("student", "teacher", "online", "target")
    with seeded_init(0):
        found = zoo.pretrained(
            spec,
            None if branch else options.weights,
            pooling=options.pooling,
            local=options.local,
            global_=options.global_,
        )
    side = found.backbone.img_size
    if side is not None and options.img_size not in (None, side):
        raise UsageError(f"{spec} takes images of side {side} only; leave --img-size {options.img_size} out")
    arch = name.partition(":")[0] if source == "torchvision" else spec
    report = KeyReport(
        layout=source,
        branch=None,
        branches=(),
        arch=arch,
        inferred=(),
        matched=len(found.backbone.state_dict()),
        head=head_line("", found.head),
        notes=(found.backbone.note,) if options.local or options.global_ else (),
    )
    return Model(
        name=name,
        arch=arch,
        backbone=found.backbone,
        head=found.head,
        classes=found.classes,
        preprocessing=options.preprocessing(found.preprocessing),
        sha256="",
        layout=source,
        report=report,
        architecture=Architecture(
            arch, img_size=side, pooling=options.pooling, local=options.local, global_=options.global_
        ),
    )


def _from_file(path: Path, options: LoadOptions) -> Model:
    folder = path.absolute().parent.name
    stem = Path(path.name.removesuffix(".index.json").removesuffix(".tar")).stem
    name = {"model": folder}.get(stem, f"{folder}/{stem}") if stem in GENERIC_NAMES else stem
    with checkpoint_file(path) as file:
        content = read_file(file)
        try:
            return _of_content(name if path.is_file() else path.absolute().name, content, file, options)
        except RecursionError as error:
            raise CossError(f"{path.name} holds itself, so it is no checkpoint of a network") from error
        except CossError as error:
            raise type(error)(f"{path.name}: {error}") from error
        except ODD as error:
            if options.arch is not None and is_own(options.arch):
                raise  # of the person's own code
            reason = " ".join(str(error).split())[:120]
            raise CossError(
                f"{path.name}: its entries have shapes or values of no known network ({type(error).__name__}: "
                f"{reason}); give another file"
            ) from error


def _of_content(name: str, content: dict[str, Any], file: Path, options: LoadOptions) -> Model:
    """The Model that a file's content is, by our own metadata or by its tensors."""
    config = content.get(METADATA, {}).get(CONFIG)
    if config is not None:
        return own_model(name, content, config, options)
    if content.keys() >= TRAINER_STATE:  # its network would be found, but neither normalisation nor geometry
        raise UsageError(
            "this is the trainer's state: give the model.safetensors beside it "
            "(or, while training goes on, an epoch-*.safetensors that keep_every leaves)"
        )
    try:
        return foreign_model(name, content, options, file)
    except Lookalike:
        raise  # which of the two it is, a person must say
    except CossError:
        said = architecture_beside(file) if options.arch is None else None
        if said is None or said not in timm_names():
            raise
        refuse_larger(Architecture(f"timm:{said}"), flatten(content).values())
        model = foreign_model(name, content, replace(options, arch=f"timm:{said}"), file)
        assert model.report is not None
        note = f"arch timm:{said}, as config.json beside the file says"
        return replace(model, report=replace(model.report, notes=(*model.report.notes, note)))
