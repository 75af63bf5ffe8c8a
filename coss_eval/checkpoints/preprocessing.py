"""The preprocessing that comes with a network: mean and std inside the file or the code, and config files beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torchvision.transforms import Normalize, v2

from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.hooks import hooked
from coss_eval.models.traced import SplitBackbone, traced
from coss_eval.models.trial import evaluating

_MEAN = re.compile(r"^(?P<place>(?:.*\.)?_?(?:[^\W_]+_)?)(?P<word>mean|mu)(?P<end>_?)$", re.IGNORECASE)
_PARTNERS = {"mean": ("std", "sigma"), "mu": ("sigma", "std"), "MEAN": ("STD", "SIGMA"), "MU": ("SIGMA", "STD")}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "truediv", "float", "clone", "contiguous"}
_PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


class Constants(NamedTuple):
    """Three means and three standard deviations, for pixels in [0, 1], and the names of the tensors that hold them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, str]

    def __str__(self) -> str:
        shown = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.names[0]} {next(shown)}, {self.names[1]} {next(shown)}"


def constants_in(tensors: Mapping[str, Tensor]) -> list[Constants]:
    """Every pair of tensors that holds the constants of a normalisation: by their names, three values, std above 0.

    Constants for pixels in 0 to 255 (a mean above 2) are brought to [0, 1].
    """
    found = []
    for key, mean in tensors.items():
        match = _MEAN.fullmatch(key)
        if match is None or mean.numel() != 3 or not mean.is_floating_point():
            continue
        names = (f"{match['place']}{partner}{match['end']}" for partner in _PARTNERS.get(match["word"], ()))
        for name in names:
            std = tensors.get(name)
            if std is not None and std.numel() == 3 and bool((std > 0).all()):
                scale = 255.0 if float(mean.max()) > 2 else 1.0
                values = (tuple(round(float(v) / scale, 7) for v in t.flatten()) for t in (mean, std))
                found.append(Constants(next(values), next(values), (key, name)))
    return found


def from_tensors(tensors: Mapping[str, Tensor], known: Preprocessing, *, asked: bool) -> Preprocessing:
    """``known`` with the file's own mean and std, where it has them.

    ``asked``: the caller gives them, and settles what several in the file would leave open. Raises UsageError there.
    """
    found = constants_in(tensors)
    if not found or asked:
        return known
    if len({(constants.mean, constants.std) for constants in found}) > 1:
        raise UsageError(
            f"it holds several normalisations ({found[0]}; {found[1]}); say which is meant with --mean and --std"
        )
    return replace(known, mean=found[0].mean, std=found[0].std, said_by=f"the file: {found[0]}")


def inside(network: nn.Module, example: Tensor) -> str | None:
    """How the network normalises its input by itself, in words; None where it does not.

    Seen at buffers of the usual names whose values change the output, and at torchvision's Normalize modules that run.
    """
    tensors = dict(network.named_buffers()) | dict(network.named_parameters())
    for constants in constants_in(tensors):
        if _matters(network, tensors[constants.names[0]], example):
            return str(constants)
    for name, module in network.named_modules():
        if isinstance(module, Normalize | v2.Normalize) and _runs(network, module, example):
            return f"{name}: {module}"
    return None


def of_own_code(backbone: Backbone, known: Preprocessing, *, asked: bool) -> Preprocessing:
    """``known`` with nothing left to normalise where the network's own code does so; ``asked``: by a flag as well.

    Raises UsageError where both would.
    """
    sides = 2 * [backbone.img_size or 64]
    example = torch.rand(1, backbone.channels, *sides, generator=torch.Generator().manual_seed(0))
    words = inside(backbone, example)
    if words is None and not asked:  # a flag knows better what such steps are for
        words = _first_steps(backbone, example)
    if words is None:
        return known
    if asked:
        raise UsageError(f"the network normalises its input by itself ({words}); leave --mean and --std out")
    return replace(known, mean=(0.0,) * 3, std=(1.0,) * 3, said_by=f"the network's own code: {words}")


def _first_steps(backbone: Backbone, example: Tensor) -> str | None:
    """What the code does to its pixels first, where it subtracts or adds constants: "sub, truediv"; else None.

    Constants in code have no names to be found by. Learned parameters are none.
    """
    root = backbone.body if isinstance(backbone, SplitBackbone) else backbone
    graph = root.graph if isinstance(root, fx.GraphModule) else traced(root, example)
    node = None if graph is None else next(iter(graph.nodes))
    words: list[str] = []
    while node is not None:
        if len(node.users) != 1:
            break
        (step,) = node.users
        word = str(getattr(step.target, "__name__", step.target)).strip("_")
        constants = [used for used in step.all_input_nodes if used is not node]
        named = [attrgetter(str(used.target))(root) for used in constants if used.op == "get_attr"]
        if word not in _ARITHMETIC or len(named) < len(constants) or any(isinstance(v, nn.Parameter) for v in named):
            break
        words.append(word)
        node = step
    return f"{', '.join(words)} with constants first" if {"sub", "rsub", "add"} & set(words) else None


def _matters(network: nn.Module, mean: Tensor, example: Tensor) -> bool:
    """Whether the output depends on these values."""
    kept = mean.detach().clone()
    with evaluating(network):
        before = network(example)
        mean.data += 0.5
        try:
            return not torch.equal(network(example), before)
        finally:
            mean.data.copy_(kept)


def _runs(network: nn.Module, module: nn.Module, example: Tensor) -> bool:
    calls: list[bool] = []
    with evaluating(network), hooked([(module, lambda *_: calls.append(True))]):
        network(example)
    return bool(calls)


def beside(path: Path) -> Preprocessing | None:
    """What the config files in a checkpoint's folder say: Hugging Face's preprocessor_config.json, timm's config.json.

    None where there is none. Raises CossError for one that cannot be read.
    """
    shown = _json(path.parent / "preprocessor_config.json")
    if shown.get("image_mean") or shown.get("do_normalize") is False:
        return _hugging_face(shown)
    shown = _json(path.parent / "config.json").get("pretrained_cfg", {})
    if isinstance(shown, dict) and {"mean", "std", "input_size", "crop_pct", "interpolation"} <= shown.keys():
        return zoo.timm_preprocessing(shown, "config.json beside the file")
    return None


def config_beside(path: Path) -> dict[str, Any]:
    """The config.json of a model in Hugging Face's layout, of its part for images; empty where there is none."""
    config = _json(path.parent / "config.json")
    vision = config.get("vision_config")
    return config | vision if isinstance(vision, dict) else config


def architecture_beside(path: Path) -> str | None:
    """timm's name of the network, from the config.json of a model on the Hugging Face hub."""
    name = _json(path.parent / "config.json").get("architecture")
    return name if isinstance(name, str) else None


def _hugging_face(shown: Mapping[str, Any]) -> Preprocessing:
    scale = 255.0 * ((shown.get("rescale_factor") or 1 / 255) if shown.get("do_rescale", True) else 1)
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-3) else scale  # what mean and std are for, in units of [0, 1]
    plain = shown.get("do_normalize") is False
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (_three(shown, "image_mean"), _three(shown, "image_std"))
    resized = _side(shown.get("size")) if shown.get("do_resize", True) else None
    cropped = _side(shown.get("crop_size")) if shown.get("do_center_crop", False) else None
    side, fraction = cropped or resized, shown.get("crop_pct")
    if fraction is None:
        fraction = cropped / resized if cropped and resized and cropped <= resized else 1.0
    return Preprocessing(
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
        side,
        fraction,
        "bicubic" if _PIL_RESAMPLING.get(shown.get("resample", 2)) == "bicubic" else "bilinear",
        "preprocessor_config.json beside the file",
    )


def _three(shown: Mapping[str, Any], entry: str) -> tuple[float, ...]:
    """One number for each colour; where the file has one for all, that."""
    given = shown.get(entry)
    values = tuple(given) if isinstance(given, list) else (given,)
    values = 3 * values if len(values) == 1 else values
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if len(values) != 3 or not numbers or (entry == "image_std" and min(values) <= 0):
        raise CossError(
            f"{entry} in preprocessor_config.json beside it is {given!r}, where three numbers are expected (of a "
            "deviation above 0); mend it or move it away"
        )
    return tuple(float(value) for value in values)


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty where there is no such file, or where it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CossError(f"{path.name} beside it cannot be read ({error}); mend it or move it away") from error
    return content if isinstance(content, dict) else {}
