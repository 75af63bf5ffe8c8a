"""Architectures by name, with random or published weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import vision_transformer

from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import Pooling, Stem
from coss_eval.models.cifar_resnet import CifarResNet
from coss_eval.models.cifar_resnet import from_name as cifar_from_name
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.families import use_cifar_stem
from coss_eval.models.rf_resnet import PRESETS, RFResNet, from_name
from coss_eval.models.wrap import wrap as wrap
from coss_eval.randomness import seeded_init
from coss_eval.runtime.imports import current_directory_first, imported
from coss_eval.runtime.remote import refuse_remote

SCALABLE = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # names that its published files still use


class Pretrained(NamedTuple):
    backbone: Backbone
    head: nn.Module | None
    classes: tuple[str, ...] | None  # WordNet ids, in the head's order, where the weights are ImageNet-1K's
    preprocessing: Preprocessing


def network(
    arch: str,
    *,
    stem: Stem = "imagenet",
    width: int = 64,
    num_classes: int | None = None,
    img_size: int | None = None,
    seed: int | None = 0,
) -> nn.Module:
    """A network with random weights and the key names of its origin, so that its state dicts load.

    ``arch``: a torchvision classification architecture, "timm:NAME", an RF-ResNet (see ``rf_resnet.from_name``), one
    for 32 px (see ``cifar_resnet.from_name``), or
    "package.module:factory" (a class or function that takes no arguments; modules in the current directory are found).
    ``stem``: see ``use_cifar_stem``. ``width``: planes of a ResNet's first stage. ``num_classes`` None keeps the
    architecture's default, and a factory decides for itself. ``seed`` None draws from torch's CPU generator as it
    stands; with an int that is left untouched.
    """
    arch = arch.removeprefix("torchvision:")
    with seeded_init(seed) if seed is not None else nullcontext():
        rf_resnet = from_name(arch, stem=stem, width=width, **_given(num_classes=num_classes))
        if rf_resnet is not None:
            return rf_resnet
        cifar = cifar_from_name(arch)
        if cifar is not None:
            if width != 64 or stem != "imagenet":
                raise UsageError(f"{arch}: its name says stem and width (cifar_resnet20_w32); leave the flags out")
            return CifarResNet(cifar, **_given(num_classes=num_classes))
        if width != 64:
            return _scaled_network(arch, stem, width, num_classes)
        if arch.startswith("timm:"):
            made = _timm_network(arch.removeprefix("timm:"), num_classes, img_size)
        elif is_own(arch):
            made = _own_network(arch)
        else:
            made = _torchvision_network(arch, num_classes, img_size)
        if stem != "imagenet":
            use_cifar_stem(made, stem)
        return made


def pretrained(
    spec: str,
    weights: str | Path | None = None,
    *,
    pooling: Pooling = "own",
    local: str | None = None,
    global_: str | None = None,
) -> Pretrained:
    """A published network: "torchvision:resnet50", "torchvision:resnet50:IMAGENET1K_V1" or "timm:NAME".

    ``weights``: the name of one of torchvision's weights entries (default: DEFAULT), or a local file of weights as
    they are published, for a machine without a network; the entry published under that file name, else the default
    one, gives the preprocessing. Raises CossError where weights cannot be fetched or do not fit.
    """
    source, _, name = spec.partition(":")
    if source == "torchvision":
        made, preprocessing = _torchvision_pretrained(name, weights)
    elif source == "timm":
        made, preprocessing = _timm_pretrained(name, weights)
    else:
        raise unknown_name("source of pretrained weights", source, ("torchvision", "timm"))
    backbone, head = wrap(made.eval(), name, pooling=pooling, local=local, global_=global_)
    classes = imagenet_wnids() if isinstance(head, nn.Linear) and head.out_features == 1000 else None
    return Pretrained(backbone, head, classes, preprocessing)


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1K's 1000 classes, sorted: the order of every published head."""
    return tuple(resources.files("coss_eval.models").joinpath("imagenet_wnids.txt").read_text().split())


def _torchvision_pretrained(spec: str, weights: str | Path | None) -> tuple[nn.Module, Preprocessing]:
    name, _, entry_name = spec.partition(":")
    if name not in _torchvision_names():
        raise unknown_name("torchvision architecture", name, _torchvision_names())
    entries = {entry.name: entry for entry in torchvision.models.get_model_weights(name)}
    default = torchvision.models.get_model_weights(name).DEFAULT
    path = None
    if weights in entries:
        entry_name = str(weights)
    elif weights is not None and str(weights) != "DEFAULT":
        path = Path(weights)
        entry_name = entry_name or next((n for n, e in entries.items() if Path(e.url).name == path.name), "")
    entry = default if entry_name in ("", "DEFAULT") else entries.get(entry_name)
    if entry is None:
        raise unknown_name(f"weights of {name}", entry_name, entries)
    made: Any = network(name, num_classes=len(entry.meta["categories"]), img_size=entry.meta["min_size"][0])
    if hasattr(made, "transform_input"):
        made.transform_input = True  # GoogLeNet's and Inception's published weights expect TensorFlow's range
    state = _read(path) if path else _download(spec, lambda: entry.get_state_dict(progress=False, check_hash=True))
    _load(made, {_OLD_DENSENET.sub(r"\1\2.", key): value for key, value in state.items()}, name, path)
    shown = entry.transforms()
    preprocessing = Preprocessing(
        tuple(shown.mean),
        tuple(shown.std),
        shown.crop_size[0],
        shown.crop_size[0] / shown.resize_size[0],
        "bicubic" if shown.interpolation.value == "bicubic" else "bilinear",
        "checkpoint",
    )
    return made, preprocessing


def _timm_pretrained(name: str, weights: str | Path | None) -> tuple[nn.Module, Preprocessing]:
    path = Path(weights) if weights is not None else None
    if path:
        made: Any = network(f"timm:{name}")
        _load(made, _read(path), name, path)
    else:
        made = _download(f"timm:{name}", lambda: _timm_network(name, None, None, pretrained=True))
    return made, timm_preprocessing(made.pretrained_cfg, "checkpoint")


def timm_preprocessing(shown: Mapping[str, Any], source: str) -> Preprocessing:
    """What timm's pretrained_cfg says of mean, standard deviation, side, centre crop and interpolation."""
    return Preprocessing(
        tuple(shown["mean"]),
        tuple(shown["std"]),
        shown["input_size"][1],
        shown["crop_pct"],
        "bilinear" if shown["interpolation"] == "bilinear" else "bicubic",
        source,
    )


def _download(spec: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CossError(f"{spec}: the weights could not be fetched ({reason}); pass a local file of them") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    """A plain state dict, from a file that runs no code; whatever else a checkpoint may hold is load_model's matter."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"no weights at {path}: expected the name of an entry or a file") from error
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CossError(f"{path} is not a readable file of weights ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CossError(f"{path} is not a plain state dict; give it as the checkpoint itself, with --arch")
    return state


def _load(made: nn.Module, state: Mapping[str, Tensor], name: str, path: Path | None) -> None:
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        own = made.state_dict()
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        misshapen = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
        raise CossError(
            f"{path or name}: not the weights of {name} as published: {len(missing)} keys missing, "
            f"{len(unexpected)} unexpected, {len(misshapen)} of another shape"
        ) from error


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_network(arch: str, num_classes: int | None, img_size: int | None) -> nn.Module:
    if arch not in _torchvision_names():
        from_timm = (f"timm:{name}" for name in timm_names())
        raise unknown_name("architecture", arch, [*_torchvision_names(), *PRESETS, *from_timm])
    options = _given(num_classes=num_classes, image_size=img_size if hasattr(vision_transformer, arch) else None)
    if arch in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what they do anyway; said aloud, they do not warn
    try:
        made: nn.Module = torchvision.models.get_model(arch, weights=None, **options)
    except AssertionError as error:  # a ViT whose patches do not divide the image
        raise UsageError(f"{arch} cannot be built for {img_size} px ({error}); take a multiple of its patch") from error
    return made


def _scaled_network(arch: str, stem: Stem, width: int, num_classes: int | None) -> nn.Module:
    if arch not in SCALABLE:
        raise UsageError(f"width {width} is for {', '.join(SCALABLE)}, not for {arch}; leave --width at 64")
    return RFResNet(SCALABLE[arch], stem=stem, width=width, **_given(num_classes=num_classes))


def _timm_network(name: str, num_classes: int | None, img_size: int | None, *, pretrained: bool = False) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm: pip install 'coss-eval[timm]'") from error
    refuse_remote(name)
    name, written = _timm_options(name)
    if name.partition(".")[0] not in timm.list_models():
        raise unknown_name("timm architecture", name, timm.list_models())
    eps = written.pop("norm_eps", None)
    options = _given(num_classes=num_classes) | written
    try:
        made: nn.Module = timm.create_model(name, pretrained=pretrained, **options, **_given(img_size=img_size))
    except TypeError:  # networks that take any size have no such argument; any other cause shows again without it
        if img_size is None:
            raise
        made = timm.create_model(name, pretrained=pretrained, **options)
    for module in made.modules() if eps is not None else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return made


def _timm_options(name: str) -> tuple[str, dict[str, Any]]:
    """ "vit_base_patch16_224(depth=2,norm_eps=1e-12)": a network's name, and what it is built with besides.

    ``norm_eps`` is that of its layer norms; the others are timm's own. Raises UsageError for what cannot be read.
    """
    plain, bracket, _ = name.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(name.replace(plain, "f", 1), mode="eval").body
        assert isinstance(call, ast.Call)
        return plain, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise UsageError(f"cannot read the options of timm:{name}; expected NAME(option=value,...)") from error


def fixed_side_in_timm(name: str) -> bool:
    """Whether timm says that a network is built for images of one side; no where it is not known."""
    name = name.partition("(")[0]
    if name.partition(".")[0] not in timm_names():
        return False
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    return known is not None and bool(known.fixed_input_size)


def is_own(arch: str) -> bool:
    """Whether the name is a person's own factory, "package.module:factory"."""
    return ":" in arch and not arch.startswith("timm:")


def timm_names() -> list[str]:
    """Every architecture of timm; empty where it is not installed."""
    try:
        import timm
    except ImportError:
        return []
    names: list[str] = timm.list_models()
    return names


def _own_network(spec: str) -> nn.Module:
    """The network that "package.module:factory" makes."""
    with current_directory_first():  # for what a factory imports when it runs, too
        factory = imported(spec, "arch", "factory")
        try:
            made = factory()
        except TypeError as error:
            raise UsageError(f"arch {spec!r}: the factory must run without arguments ({error})") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"arch {spec!r}: the factory must return a torch.nn.Module, not {type(made).__name__}")
    return made


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None: the rest keep the defaults of the function they are passed to."""
    return {name: value for name, value in options.items() if value is not None}
