"""The preprocessing that comes with a network: mean and std inside the file or the code, and config files beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import Normalize, v2

from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Preprocessing
from coss_eval.models.hooks import hooked
from coss_eval.models.trial import evaluating
from coss_eval.runtime.disk import read_text

_MEAN = re.compile(r"^(?P<place>(?:.*\.)?_?(?:[^\W_]+_)?)(?P<word>means?|mu)(?P<end>_?)$", re.IGNORECASE)
_DEVIATIONS = ("std", "sigma", "stds", "sd", "sds", "stdev", "var", "vars", "variance")
_RUNNING = ("running_", "moving_")  # statistics of a BatchNorm, which are no constants of the pixels
_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "mm", "bmm", "addmm", "einsum", "lstm"}
_LAYERS |= {"gru", "batch_norm", "layer_norm", "group_norm", "instance_norm", "multi_head_attention_forward"}
_LOOKED_AT = 8  # layers at most: some read weights, as where those are standardised, before one reads the pixels
_DEEP = 20.0  # no mean or deviation of pixels in [0, 1] lies above it, and none of those in 0 to 255 below
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
        if match is None or match["place"].endswith(_RUNNING) or mean.numel() != 3 or not mean.is_floating_point():
            continue
        for word in _DEVIATIONS:
            name = f"{match['place']}{word.upper() if match['word'].isupper() else word}{match['end']}"
            spread = tensors.get(name)
            if spread is not None and spread.numel() == 3 and bool((spread > 0).all()):
                std = spread.sqrt() if word.startswith("var") else spread
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
    words, steps = inside(backbone, example), _first_steps(backbone, example)
    if words is None and (asked or steps is None):  # a flag knows better what steps without a name are for
        _refuse_script(backbone, asked=asked)
        return known
    if asked:
        raise UsageError(f"the network normalises its input by itself ({words}); leave --mean and --std out")
    deep = steps is not None and steps.deep
    said = f"the network's own code: {words or steps}{', of pixels in 0 to 255' if deep else ''}"
    return replace(known, mean=(0.0,) * 3, std=(1 / 255 if deep else 1.0,) * 3, said_by=said)


class _FirstSteps(NamedTuple):
    """What a network makes of its pixels before its first layer: of black (0) and white (1) ones, and of 2."""

    layer: str
    black: float
    white: float
    beyond: float

    def __str__(self) -> str:
        return f"{self.layer}, its first layer, is given {self.black:.3g} for black and {self.white:.3g} for white"

    @property
    def scale(self) -> float:
        return self.white - self.black

    @property
    def normalise(self) -> bool:
        """Whether they shift the pixels, bring them to 0 to 255 or from there, or treat them by their range.

        What takes its constants from the image itself shows no difference between black and white.
        """
        if not math.isfinite(self.scale) or abs(self.scale) < 1e-6:
            return False
        bent = abs(self.beyond - self.white - self.scale) > 1e-3 * abs(self.scale)  # clamped; divided by 255 above 1
        return abs(self.black) > 1e-3 or self.deep or abs(self.scale) > _DEEP or bent

    @property
    def deep(self) -> bool:
        """Whether they are made for pixels in 0 to 255: by their mean or deviation."""
        return abs(self.scale) * _DEEP < 1 or abs(self.black) > _DEEP * abs(self.scale)


class _FirstLayers(TorchFunctionMode):
    """Keeps the median and the sum of what the first layers are given, whatever calls them: a module or a function."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[str, float, float]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        first = args[1] if name == "einsum" and len(args) > 1 else args[0] if args else None
        if name in _LAYERS and isinstance(first, Tensor) and len(self.given) < _LOOKED_AT:
            values = first.detach().double()
            self.given.append((name, values.median().item(), values.sum().item()))
        return func(*args, **(kwargs or {}))


def _first_steps(network: nn.Module, example: Tensor) -> _FirstSteps | None:
    """What the code does to its pixels first, where that is a normalisation, by whatever means; else None.

    The median over the values, so that padding and channels of coordinates beside the pixels do not count.
    """
    seen = []
    for value in (0.0, 1.0, 2.0):
        with evaluating(network), _FirstLayers() as first:
            try:
                network(torch.full_like(example, value))
            except (RuntimeError, ValueError, AssertionError):  # its code takes no plain images
                return None
        seen.append(first.given)
    for (name, black, dark), (_, white, bright), (_, beyond, _) in zip(*seen, strict=False):
        if dark != bright:  # the first that the pixels reach
            steps = _FirstSteps(name, black, white, beyond)
            return steps if steps.normalise else None
    return None


def _refuse_script(network: nn.Module, *, asked: bool) -> None:
    if not asked and any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise UsageError(
            "TorchScript does not show whether the network normalises its input by itself: give --mean and --std "
            "(0 0 0 and 1 1 1 where it does)"
        )


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
    resized = _side(shown, "size") if shown.get("do_resize", True) else None
    cropped = _side(shown, "crop_size") if shown.get("do_center_crop", False) else None
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


def _side(shown: Mapping[str, Any], entry: str) -> int | None:
    """The side of the square that ``entry`` names: 224, [224], [224, 224] or an object with a shortest edge or both."""
    size = shown.get(entry)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size[side] for side in ("height", "width") if side in size]
    sides: list[Any] = size if isinstance(size, list) else [size]
    if len(sides) in (1, 2) and all(isinstance(side, int) and side > 0 for side in sides) and len(set(sides)) == 1:
        return int(sides[0])
    if sides in ([], [None]):
        return None
    raise CossError(
        f"{entry} in preprocessor_config.json beside it is {shown[entry]!r}, where the side of a square is expected; "
        "mend it or move it away"
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty where there is no such file, or where it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CossError(f"{path.name} beside it cannot be read ({error}); mend it or move it away") from error
    return content if isinstance(content, dict) else {}
