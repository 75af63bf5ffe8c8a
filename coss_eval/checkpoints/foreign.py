"""Another framework's checkpoint to a Model: which network in it, of which architecture, and does it fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from coss_eval.checkpoints.flat_keys import flatten
from coss_eval.checkpoints.hugging_face import DIALECTS as HUGGING_FACE
from coss_eval.checkpoints.hugging_face import timm_arch
from coss_eval.checkpoints.key_names import DIALECTS, Dialect, StateDict, find_roots
from coss_eval.checkpoints.layouts import IMAGENET, Layout, Recognised, layout_named, recognise
from coss_eval.checkpoints.matching import (
    Fit,
    copy_into,
    head_line,
    linear_at,
    refuse_larger,
    refuse_unless_complete,
    roots_by_name,
    slots_of,
)
from coss_eval.checkpoints.options import LoadOptions
from coss_eval.checkpoints.preprocessing import (
    architecture_beside,
    beside,
    config_beside,
    constants_in,
    from_tensors,
    of_own_code,
)
from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.architecture import VIT_HEADS, VIT_SPEC, Architecture, HeadsUnknown, infer, plain_resnet
from coss_eval.models.backbone import Backbone
from coss_eval.models.cifar_resnet import CifarSpec
from coss_eval.models.cifar_resnet import from_name as cifar_from_name
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.model import KeyReport, Model, named
from coss_eval.models.rf_resnet import SPEC
from coss_eval.models.trial import evaluating

BLURRED = re.compile(r"(\w*resnet|\w*resnext)(aa|blur)\d+\w*")  # timm's names of anti-aliased ResNets
BLURRED_TWINS = {"resnet18": "resnetblur18", "resnet50": "resnetaa50"}  # the same tensors

GREY_MEAN, GREY_STD = (0.449,) * 3, (0.226,) * 3  # ImageNet's, over its colours

STEM_NOTES = {
    "cifar": "padded by 1, no max-pool",
    "solo-cifar": "padded by 2, no max-pool, as solo-learn builds it",
    "lightly-cifar": "no max-pool and no ReLU, as an nn.Sequential of lightly's ResNet computes",
}


class Lookalike(CossError):
    """The file is said to be another network, of the same tensors, than the one that its shapes tell."""


@dataclass(frozen=True)
class Blueprint:
    """The architecture to build, what the shapes say, and what of it was not given by the caller."""

    architecture: Architecture
    shapes: Architecture | None
    inferred: tuple[str, ...]
    notes: tuple[str, ...]


def foreign_model(name: str, content: dict[str, Any], options: LoadOptions, path: Path) -> Model:
    """The Model that a checkpoint of any known layout holds; its hash is not yet computed.

    ``path`` is where it lies: the names of file and folder, and config files beside it, may say which network it is.

    Raises UsageError where a flag must decide, CossError where the file does not fill the network.
    """
    options = replace(options, arch=options.arch and options.arch.removeprefix("torchvision:"))
    tensors = flatten(content)
    if not tensors:
        raise CossError("it holds no tensors that could be weights")
    roots = _roots(tensors, options)
    asked = None if options.file_layout is None else layout_named(options.file_layout)
    texts = [f"{name}={value}" for name, value in content.items() if isinstance(value, str) and len(value) < 100]
    found = recognise([*tensors, *content, *texts], roots, asked)
    branch = found.branch(options.weights)
    root, dialect = found.roots[branch], roots[found.roots[branch]]
    stored = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
    state = dialect.to_torchvision(stored) if dialect else stored

    blueprint = _blueprint(state, stored, dialect, found.layout, options, config_beside(path))
    architecture = blueprint.architecture
    refuse_larger(architecture, tensors.values(), asked=options.arch is not None)
    state, notes = _at_size(state, blueprint)
    network = architecture.network()
    slots = slots_of(network)
    backbone, own_head = architecture.wrap(network)
    constants = _constant_keys(state) - slots.keys()
    state = {key: value for key, value in state.items() if key not in constants}
    fit = copy_into(slots, backbone, state)
    classes = _other_classes(network, slots, state)
    if classes is not None and (fit.misshapen or own_head is None):  # heads that cannot be taken out, or that it lacks
        refuse_larger(architecture, tensors.values(), classes)
        network = architecture.network(num_classes=classes)
        slots = slots_of(network)
        backbone, own_head = architecture.wrap(network)
        fit = copy_into(slots, backbone, state)
    plain = options.arch is None and (found.layout.alone or not found.layout.branches)  # no framework says what it is
    others = _said_to_be(content, path) if plain else []
    hints = _hints(blueprint, fit, others, [other for other in found.roots if other != branch])
    refuse_unless_complete(fit, architecture.arch, hints, allow_partial=options.allow_partial)
    _refuse_lookalike(architecture, backbone, stored, others)

    preprocessing = _preprocessing(found.layout, architecture, network, backbone)
    preprocessing = _that_travels(preprocessing, tensors, architecture, backbone, path, asked=options.mean is not None)
    place, head = _head(tensors, state, slots, backbone, own_head, found, branch)
    of_the_head = {f"{place}{kind}" for kind in ("weight", "bias")} if head is not None else set()
    elsewhere = sum(not key.startswith(root) for key in tensors.keys() - _constant_keys(tensors) - of_the_head)
    report = KeyReport(
        layout=f"{found.layout.name} ({dialect.name})" if dialect else found.layout.name,
        branch=branch,
        branches=tuple(found.roots),
        arch=architecture.arch,
        inferred=blueprint.inferred,
        matched=len(fit.matched),
        missing=fit.missing + fit.misshapen,
        unexpected=tuple(k for k in fit.misplaced + fit.unexpected if head is None or not k.startswith(place)),
        head=head_line(place.rstrip("."), head),
        notes=(
            *blueprint.notes,
            *notes,
            *([] if fit.complete else [_partial(fit)]),
            *([f"{elsewhere} more tensor{'s' if elsewhere > 1 else ''} in the file not read"] if elsewhere else []),
            *([backbone.note] if backbone.note else []),
        ),
    )
    return Model(
        name=name,
        arch=architecture.arch,
        backbone=backbone,
        head=head,
        classes=None,
        preprocessing=options.preprocessing(preprocessing),
        sha256="",
        layout=found.layout.name,
        report=report,
        architecture=architecture,
    )


def _other_classes(network: nn.Module, slots: Mapping[str, Tensor], state: StateDict) -> int | None:
    """The number of classes in a file whose heads have more or fewer outputs than those that timm builds by itself."""
    shown: Any = getattr(network, "pretrained_cfg", None)
    if not shown:
        return None
    usual, place = getattr(network, "num_classes", 0), shown.get("classifier")
    if not usual and isinstance(place, str) and f"{place}.weight" in state:
        return state[f"{place}.weight"].shape[0]
    found = {
        state[key].shape[0]
        for key, slot in slots.items()
        if key in state and slot.ndim and slot.shape[0] == usual and state[key].shape[1:] == slot.shape[1:]
    } - {usual}
    return found.pop() if len(found) == 1 else None


def _constant_keys(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of a normalisation's mean and std among the tensors."""
    return {key for constants in constants_in(tensors) for key in constants.names}


def _said_to_be(content: dict[str, Any], path: Path) -> list[str]:
    """timm's networks that the file's entries, a config beside it, its name or its folder's name; without "timm:"."""
    entry = content.get("arch")
    said = [word for word in (entry, architecture_beside(path)) if isinstance(word, str)]
    words = re.split(r"[^a-z0-9_]+", f"{path.name} {path.absolute().parent.name}".lower())
    said += [word for word in words if re.search(r"[a-z].*\d", word)]  # "best" and "model" are not worth timm's import
    known = set(zoo.timm_names()) if said else set()
    return [word for word in dict.fromkeys(said) if word in known or BLURRED.fullmatch(word)]


def _refuse_lookalike(architecture: Architecture, backbone: Backbone, stored: StateDict, others: list[str]) -> None:
    """CossError where the file is said to be a network with the same tensors that computes something else."""
    for name in others:
        if name == architecture.arch:
            continue
        twin = Architecture(f"timm:{name}", img_size=architecture.img_size)
        try:
            refuse_larger(twin, stored.values())
        except CossError:
            continue  # nor would the file fill it
        network = twin.network()  # names the package that is needed, where timm is not installed
        slots = slots_of(network)
        other, _ = twin.wrap(network)
        if not copy_into(slots, other, stored).complete or other.dim != backbone.dim:
            continue
        side = backbone.img_size or other.img_size or 64
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with evaluating(backbone), evaluating(other):
            found, expected = backbone(pixels), other(pixels)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().nan_to_num(0, 0, 0).max())):
            raise Lookalike(
                f"it is said to be a {name}, whose tensors have the names and shapes of a {architecture.arch} but "
                f"which computes something else; give --arch timm:{name}, or --arch {architecture.arch} if it is one"
            )


def _roots(tensors: Mapping[str, Tensor], options: LoadOptions) -> dict[str, Dialect | None]:
    """Where the file holds a network: of a known kind, or one with the key names of the architecture asked for."""
    known: dict[str, Dialect | None] = {}
    if options.arch is None or ":" not in options.arch:
        known |= find_roots(tensors, (*HUGGING_FACE, *DIALECTS))
    elif options.arch.startswith("timm:"):  # under other names, which are brought to timm's
        found = find_roots(tensors, HUGGING_FACE)
        known |= {root: dialect for root, dialect in found.items() if _is_named_by_timm(tensors, root, dialect)}
    if known:
        return known
    if all("lora_" in key for key in tensors):
        raise UsageError("it holds LoRA adapters alone: merge them into their network (merge_and_unload) and save that")
    if (
        options.arch is None
        and len(tensors) <= 2
        and (weight := next((t for t in tensors.values() if t.ndim == 2), None)) is not None
    ):
        raise UsageError(
            f"it holds one linear layer ({weight.shape[1]} to {weight.shape[0]}) and no network: it is the file of a "
            "head; give its backbone's file, for which a probe is fitted"
        )
    if options.arch is None:
        raise UsageError(
            f"no ResNet, ViT, ConvNeXt or Swin among its {named(tuple(tensors))} tensors; "
            "give --arch (a torchvision name, timm:NAME or package.module:factory)"
        )
    architecture = Architecture(options.arch, options.stem or "imagenet", options.width or 64, options.img_size)
    roots = roots_by_name(list(tensors), list(slots_of(architecture.network())))
    if not roots:
        raise CossError(f"none of its {named(tuple(tensors))} tensors has a name of {options.arch}; try another --arch")
    return dict.fromkeys(roots)


def _is_named_by_timm(tensors: Mapping[str, Tensor], root: str, dialect: Dialect) -> bool:
    """Whether a dialect brings a network's names to timm's; those of plain ViTs become torchvision's."""
    stored = {key.removeprefix(root): value for key, value in tensors.items() if key.startswith(root)}
    return (
        not {"conv_proj.weight", "layer1.0.conv1.weight", "features.0.0.weight"} & dialect.to_torchvision(stored).keys()
    )


def _blueprint(
    state: StateDict,
    stored: StateDict,
    dialect: Dialect | None,
    layout: Layout,
    options: LoadOptions,
    config: Mapping[str, Any],
) -> Blueprint:
    heads = _heads_told(state, dialect, layout, options, config if dialect in HUGGING_FACE else {})
    shapes, of_timm, reason = None, None, "its network is of no known kind"
    try:
        of_timm = None if dialect is None else timm_arch(state, config, heads)
        if of_timm is not None:
            shapes = Architecture(of_timm[0], img_size=of_timm[1])
        elif dialect is not None:
            raw = any(".downsample." in key for key in stored)  # those called "shortcut" take the activated input
            shapes = infer(state, vit_heads=heads, raw_shortcuts=raw)
    except HeadsUnknown:
        if options.arch is None:
            raise
    except UsageError as error:
        reason = str(error)
    if shapes is not None and shapes.stem == "cifar":
        shapes = replace(shapes, stem=dialect.stem if dialect and dialect.stem else layout.cifar_stem)
    elif shapes is not None and dialect is not None and dialect.stem:
        raise UsageError("its ResNet has a 7x7 stem without max-pool; give --arch package.module:factory for it")
    if options.arch is None and shapes is None:
        raise UsageError(f"{reason}; give --arch (a torchvision name, timm:NAME or package.module:factory)")
    by_shape = shapes is not None and (options.arch is None or _related(options.arch, shapes.arch))
    base = shapes if shapes is not None and by_shape else Architecture(options.arch or "")
    base = replace(base, arch=options.arch or base.arch)
    if shapes is not None and (base.is_vit or base.arch == shapes.arch):  # with another number of heads, perhaps
        base = replace(base, img_size=shapes.img_size)
    architecture = replace(
        base,
        stem=options.stem or base.stem,
        width=options.width or base.width,
        img_size=options.img_size or base.img_size,
        pooling=options.pooling,
        local=options.local,
        global_=options.global_,
    )
    if options.width is None and architecture.width != 64 and plain_resnet(architecture.arch) not in zoo.SCALABLE:
        what = f"it looks like a {architecture.arch} of width {architecture.width}, which no name says"
        raise UsageError(f"{what}; give --arch (package.module:factory)")
    fields = ["arch", "img_size"] if architecture.is_vit else ["arch", "stem", "width"]
    fields = ["arch"] if cifar_from_name(architecture.arch) else fields
    inferred = tuple(name for name in fields if by_shape and getattr(options, name) is None)
    notes = list(_assumptions(architecture, layout, inferred, heads))
    if of_timm is not None and options.arch is None:
        inferred = ("arch", "img_size")
        notes += of_timm[2]
    return Blueprint(architecture, shapes, inferred, tuple(notes))


def _heads_told(
    state: StateDict, dialect: Dialect | None, layout: Layout, options: LoadOptions, config: Mapping[str, Any]
) -> dict[int, int]:
    """Attention heads by a ViT's channels where something tells them: --arch, a config beside the file, its layout."""
    told = dict(layout.vit_heads)
    dim = state["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in state else 0
    if dialect is not None and dialect.head_channels and dim not in VIT_HEADS:
        told[dim] = max(1, dim // dialect.head_channels)
    if isinstance(config.get("hidden_size"), int) and isinstance(config.get("num_attention_heads"), int):
        told[config["hidden_size"]] = config["num_attention_heads"]
    if spec := VIT_SPEC.fullmatch(options.arch or ""):
        told[int(spec[1])] = int(spec[3])
    if option := re.search(r"\bnum_heads=(\d+)\b", options.arch or ""):  # of timm's
        told[dim] = int(option[1])
    return told


def _related(arch: str, other: str) -> bool:
    """Whether the shapes tell stem and width of both alike: the same ResNet, but for 1x1s in 3x3s' place and an MLP."""
    return plain_resnet(arch) == plain_resnet(other)


def _assumptions(
    architecture: Architecture, layout: Layout, inferred: tuple[str, ...], heads_told: Mapping[int, int]
) -> list[str]:
    """What no shape tells and was decided all the same."""
    notes = []
    if "stem" in inferred and architecture.stem != "imagenet":
        notes.append(f"3x3 stem ASSUMED {architecture.stem} ({STEM_NOTES[architecture.stem]}); else give --stem")
    if "arch" in inferred and (spec := VIT_SPEC.fullmatch(architecture.arch)):
        dim, blocks, heads, patch = map(int, spec.groups())
        why = (
            f"as {layout.name} has" if dim in layout.vit_heads else f"ASSUMED, as published ViTs of {dim} channels have"
        )
        if heads_told.get(dim) == layout.vit_heads.get(dim):  # else a config beside the file says it
            notes.append(f"{heads} attention heads ({why}); else give --arch vit_d{dim}_l{blocks}_hN_p{patch}")
    if "arch" in inferred and (spec := SPEC.fullmatch(architecture.arch)):
        if int(spec["depth"]) >= 50:
            notes.append(f"strides ASSUMED as torchvision has them; else give --arch {architecture.arch}_v1")
        if spec["layers"]:
            plain = plain_resnet(architecture.arch)
            notes.append(f"mlp ASSUMED between pooling and classifier; if it is a projection head, give --arch {plain}")
    if "arch" in inferred and (cifar := cifar_from_name(architecture.arch)):
        notes += _of_shortcuts(cifar)
    blurrable = architecture.arch in BLURRED_TWINS and architecture.stem == "imagenet"
    if "arch" in inferred and blurrable and (layout.alone or not layout.branches):
        twin = BLURRED_TWINS[architecture.arch]
        notes.append(f"no anti-aliasing ASSUMED (it leaves no tensors); else give --arch timm:{twin}")
    return notes


SHORTCUTS = {
    "pad": ("zeros on both sides of the planes (no tensor tells)", "padend"),
    "conv": ("convolutions of the activated input, as in files that call them 'shortcut'", "rawconv"),
    "rawconv": ("convolutions of the raw input, as in files that call them 'downsample'", "conv"),
}


def _of_shortcuts(spec: CifarSpec) -> list[str]:
    """What is assumed of a CIFAR ResNet's shortcuts."""
    if spec.shortcut not in SHORTCUTS:
        return []
    words, other = SHORTCUTS[spec.shortcut]
    return [f"shortcuts ASSUMED {words}; else give --arch {replace(spec, shortcut=other).name}"]  # type: ignore[arg-type]


def _at_size(state: StateDict, blueprint: Blueprint) -> tuple[StateDict, tuple[str, ...]]:
    """A ViT's position embedding resized to the side asked for, where that is not the one it was trained at."""
    trained, side = blueprint.shapes.img_size if blueprint.shapes else None, blueprint.architecture.img_size
    if trained is None or side in (None, trained):
        return state, ()
    if "conv_proj.weight" not in state and "patch_embed.proj.weight" not in state:
        return state, ()
    patch = state["conv_proj.weight" if "conv_proj.weight" in state else "patch_embed.proj.weight"].shape[-1]
    if side % patch:
        raise UsageError(f"--img-size {side} is not a multiple of the patch size {patch}")
    if "conv_proj.weight" not in state:
        return _resized(state, side // patch, trained // patch), _resized_note(state, trained, side)
    note = f"position embedding resized from {trained} to {side} px (bicubic)"
    return dict(interpolate_embeddings(side, patch, state)), (note,)  # type: ignore[arg-type]


def _resized(state: StateDict, grid: int, trained: int) -> StateDict:
    """The positions of timm's ViT for another grid of patches; those of class and register tokens stay."""
    positions = state.get("pos_embed")
    if positions is None:  # rotary: made for any grid
        return state
    prefix = positions.shape[1] - trained**2
    patches = positions[:, prefix:].float().reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return state | {"pos_embed": torch.cat([positions[:, :prefix].float(), resized.flatten(2).transpose(1, 2)], dim=1)}


def _resized_note(state: StateDict, trained: int, side: int) -> tuple[str, ...]:
    return (f"position embedding resized from {trained} to {side} px (bicubic)",) if "pos_embed" in state else ()


def _hints(blueprint: Blueprint, fit: Fit, others: list[str], other_branches: list[str]) -> list[str]:
    """The flags that would mend a network that the file does not fill."""
    hints, shapes, built = [], blueprint.shapes, blueprint.architecture
    if shapes is not None and _related(shapes.arch, built.arch):
        differing = [name for name in ("stem", "width") if getattr(shapes, name) != getattr(built, name)]
        hints = [f"--{name} {getattr(shapes, name)}" for name in differing]
    if shapes is not None and not hints and shapes.arch != built.arch:
        hints = [f"--arch {shapes.arch}"]
    elif not hints and (shapes is None or fit.misplaced or fit.misshapen):  # a relative: layer scale, another MLP, ...
        named_so = [f"--arch timm:{name}" for name in others if name != built.arch]
        hints = named_so or ["another --arch (timm:NAME, package.module:factory)"]
    return [*hints, *(f"--weights {name}" for name in other_branches)]


def _partial(fit: Fit) -> str:
    at_random, unused = len(fit.missing + fit.misshapen), len(fit.misplaced)
    return f"PARTIAL: {at_random} of the network's tensors stay at random, {unused} of the file's have no place in it"


def _head(
    tensors: Mapping[str, Tensor],
    state: StateDict,
    slots: Mapping[str, Tensor],
    backbone: Backbone,
    own_head: nn.Module | None,
    found: Recognised,
    branch: str,
) -> tuple[str, nn.Linear | None]:
    """The classifier in the file and its place: beside the network where the layout has it, or as its last layer."""
    if own_head is None:
        return "", None
    for place in found.head_places(branch):
        head = linear_at(tensors, place, backbone.dim)
        if head is not None:
            return place, head
    if found.layout.own_fc:
        weight: Any = own_head.weight  # of a 1x1 convolution, it is a view
        same = (key for key, slot in slots.items() if slot.data_ptr() == weight.data_ptr())
        for place in (key.removesuffix("weight") for key in same):
            return place, linear_at(state, place, backbone.dim)
    return "", None


def _preprocessing(layout: Layout, architecture: Architecture, network: nn.Module, backbone: Backbone) -> Preprocessing:
    """What the layout's framework fixes, or timm for its network.

    ImageNet constants do not hold where somebody gave the network a CIFAR stem.
    """
    known = Preprocessing(img_size=backbone.img_size)
    if backbone.channels == 1:
        known = replace(known, mean=GREY_MEAN, std=GREY_STD)
    shown: Any = getattr(network, "pretrained_cfg", None)
    if layout.moments is None and architecture.arch.startswith("timm:") and architecture.stem == "imagenet" and shown:
        known = zoo.timm_preprocessing(shown, f"timm's for {architecture.arch.removeprefix('timm:')}")
        return replace(known, img_size=backbone.img_size or known.img_size)
    if layout.moments is not None and not (layout.moments == IMAGENET and architecture.stem != "imagenet"):
        known = replace(known, mean=layout.moments[0], std=layout.moments[1], said_by="layout")
    return replace(known, interpolation=layout.interpolation or known.interpolation)


def _that_travels(
    known: Preprocessing,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    backbone: Backbone,
    path: Path,
    *,
    asked: bool,
) -> Preprocessing:
    """``known`` with what comes with the file before it: the network's own code, the file's tensors, configs beside."""
    configured = beside(path)
    if configured is not None:
        known = replace(configured, img_size=backbone.img_size or configured.img_size)
    if architecture.own:
        own = of_own_code(backbone, known, asked=asked)
        if own is not known:
            return own
    return from_tensors(tensors, known, asked=asked)
