"""The configuration of a run: preset, method and overrides put together; its differences from another run's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from math import inf
from typing import Any, Literal

import yaml

from coss_eval.errors import UsageError, unknown_name
from coss_eval.models.architecture import takes_stem
from coss_eval.models.choices import Pooling, Stem
from coss_eval.models.rf_resnet import is_rf_resnet
from coss_eval.models.zoo import SCALABLE
from coss_eval.training import presets as presets
from coss_eval.training.fields import build
from coss_eval.training.local import LocalConfig
from coss_eval.training.method import Method
from coss_eval.training.methods import make_method, method_class, split_name

LOCAL_FIELDS = tuple(f.name for f in fields(LocalConfig))
BOOKKEEPING = (
    "probe_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_every",
    "log_every",
)  # they change no weight
AT_LEAST_1 = ("epochs", "batch_size", "accumulate", "checkpoint_every", "log_every", "width", "size", "small_size")
AT_LEAST_0 = (
    "lr",
    "weight_decay",
    "warm_up_epochs",
    "trust",
    "vector_lr",
    "clip_gradient",
    "probe_every",
    "checkpoint_minutes",
    "keep_every",
    "small_views",
    "seed",
)
KIND = "field of the configuration"  # in errors
LEAST = dict.fromkeys(AT_LEAST_1, 1) | dict.fromkeys(AT_LEAST_0, 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that the weights of a run depend on, beside the data and the number of threads.

    ``size``: side of the views in pixels; None takes the images' own, and a ViT's. ``recipe`` names the variant of the
    method's views (see augmentation.ViewRecipe), which ``crop_min_scale`` (the paper's c_min), ``small_views`` and
    ``small_size`` change. ``small_predictor``: in methods that have a predictor, small views have one of their own
    beside the full views', or share that (see Pretraining). ``lr`` is for a batch of 256 and scaled by batch / 256.
    ``clip_trust`` bounds LARS's step (LARC), ``vector_lr`` scales the rate of biases and normalisation,
    ``clip_gradient`` is a norm, 0 for none.
    ``ema``: the target's tau at first, rising to 1 along a cosine. ``accumulate``: micro-batches a step; BatchNorm
    then sees micro-batches. ``holdout``: share of the training images kept out for the online probes, 0 for none.
    ``normalise``: by the data's own mean and deviation, or ImageNet's. ``options``: fields of the method itself.
    The trainer's state is saved at the end of every ``checkpoint_every`` epochs, and inside an epoch where it is
    ``checkpoint_minutes`` old, 0 for never.
    """

    method: str
    preset: str = ""

    arch: str = "resnet18"
    stem: Stem = "cifar"
    width: int = 64
    pooling: Pooling = "own"

    size: int | None = None
    recipe: Literal["imagenet", "cifar"] = "cifar"
    crop_min_scale: float | None = None
    small_views: int | None = None
    small_size: int | None = None
    small_predictor: Literal["own", "shared"] = "own"
    normalise: Literal["data", "imagenet"] = "data"
    holdout: float = 0.1

    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    optimizer: Literal["lars", "sgd", "adamw"] = "sgd"
    lr: float = 0.06
    weight_decay: float = 5e-4
    momentum: float = 0.9
    trust: float = 1e-3
    clip_trust: bool = False
    vector_lr: float = 1.0
    clip_gradient: float = 0.0
    warm_up_epochs: float = 10.0
    ema: float = 0.99
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False

    local: LocalConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)

    probe_every: int = 10
    checkpoint_every: int = 1
    checkpoint_minutes: float = 10.0
    keep_every: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < inf:  # no NaN either
                raise UsageError(f"{name} must be a number of at least {least}, got {value}")
        if self.seed >= 2**63 - 1:  # heads draw from the next one
            raise UsageError(f"seed must be below 2^63 - 1, got {self.seed}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be at least 0 and below 1, got {self.momentum:g}")
        if not 0 <= self.ema <= 1 or not 0 <= self.holdout < 1:
            raise UsageError(f"ema must lie in 0 ... 1 and holdout below 1, got {self.ema} and {self.holdout}")
        if self.crop_min_scale is not None and not 0 < self.crop_min_scale <= 1:
            raise UsageError(
                f"crop_min_scale is a share of the image's area, above 0 and at most 1, got {self.crop_min_scale:g}"
            )
        if self.warm_up_epochs > self.epochs:
            raise UsageError(
                f"{self.warm_up_epochs:g} warm_up_epochs do not fit into {self.epochs} epochs; lower them, too, as by "
                "--set warm_up_epochs=0"
            )
        if self.compile and self.local is not None and self.local.site != "prepool":
            raise UsageError(
                f"locals at {self.local.site} are read by a hook, which compile does not take; leave it out"
            )
        if self.batch_size % self.accumulate:
            raise UsageError(f"a batch of {self.batch_size} does not divide into {self.accumulate} micro-batches")
        if self.batch_size // self.accumulate < 2:
            raise UsageError("BatchNorm needs two images at a time; take a larger batch_size or less accumulate")
        if self.accumulate > 1 and self.kind.couples_samples:
            raise UsageError(
                f"{self.base}'s loss compares the images of a batch, so gradients cannot be accumulated over smaller "
                "ones; leave accumulate at 1"
            )

    @property
    def base(self) -> str:
        """The method's name without the CO term's prefix."""
        return split_name(self.method)[0]

    @property
    def kind(self) -> type[Method]:
        """The method's class."""
        return method_class(self.base)

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def make_method(self, classes: int) -> Method:
        """The method with its options; a supervised one with a head for so many classes."""
        own = {"classes": classes} if self.kind.targets == "labels" else {}
        return make_method(self.base, **own, **self.options)

    def summary(self) -> str:
        """The fields that people ask for first, in one line."""
        preset = f"preset {self.preset}, " if self.preset else ""
        network = f"{self.arch} ({self.stem} stem, width {self.width})" if _scalable(self.arch) else self.arch
        rate = f"{self.optimizer}, lr {self.lr:g} for a batch of 256"
        epochs = f"{self.epochs} epochs in batches of {self.batch_size}"
        return f"{preset}{network}, {epochs}{self._small()}, {rate}, seed {self.seed}"

    def _small(self) -> str:
        """The small views asked for and whose predictor they take, where there is one."""
        if not self.small_views:
            return ""
        own = "their own predictor" if self.small_predictor == "own" else "the full views' predictor"
        return f", {self.small_views} small views" + (f" with {own}" if self.kind.has_predictor else "")

    def as_dict(self) -> dict[str, Any]:
        """As JSON and YAML have it; ``from_dict`` is its inverse."""
        return asdict(self)

    def digest(self) -> str:
        """16 hex digits, alike for two runs that differ in their seed alone; bookkeeping does not count."""
        fields = {k: v for k, v in _flat(self.as_dict()).items() if k != "seed" and k not in BOOKKEEPING}
        return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration that a run wrote; an older one, which had one predictor for all views, says so."""
        config = build(cls, values, KIND)
        one_for_all = "small_predictor" not in values and config.small_views and config.kind.has_predictor
        return replace(config, small_predictor="shared") if one_for_all else config

    def differences(self, other: Config) -> list[str]:
        """What another run has otherwise, as lines "lr: 0.5, there 0.3"; bookkeeping does not count."""
        mine, theirs = _flat(self.as_dict()), _flat(other.as_dict())
        return [
            f"{name}: {mine.get(name)!r}, there {theirs.get(name)!r}"
            for name in sorted({*mine, *theirs})
            if name not in BOOKKEEPING and mine.get(name) != theirs.get(name)
        ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def resolve(method: str, preset: str | None = None, **overrides: Any) -> Config:
    """The configuration of ``method``: defaults, then the preset, its part for this method, then ``overrides``.

    Overrides are fields of Config, of LocalConfig (for a co- method) or of the method itself, without a prefix. Raises
    UsageError for unknown presets, methods and fields, with what was meant.
    """
    base, co = split_name(method)
    kind = method_class(base)
    values: dict[str, Any] = {"method": method, "preset": preset or ""}
    layers = [*_preset_layers(preset, base), _neutral(overrides.get("arch")), overrides]
    local: dict[str, Any] = {}
    options: dict[str, Any] = {}
    own = {f.name for f in fields(kind)}
    config_fields = {f.name for f in fields(Config)} - {"method", "preset"}
    for layer in layers:
        for name, value in layer.items():
            if name in ("local", "options") and not isinstance(value, Mapping):
                raise UsageError(f"{name} takes fields with their values, got {value!r}")
            if name == "local":
                local |= value
            elif name == "options":
                options |= value
            elif name in config_fields:
                values[name] = value
            elif name in LOCAL_FIELDS:
                local[name] = value
            elif name == "classes" and name in own:
                raise UsageError("the number of classes is the data's; leave it out")
            elif name in own:
                options[name] = value
            else:
                raise unknown_name("field", name, config_fields | own | (set(LOCAL_FIELDS) if co else set()))
    if not co and (overrides.keys() & set(LOCAL_FIELDS) or overrides.get("local")):
        raise UsageError(f"fields of the local term need the method co-{base}, not {method}")
    if overrides.get("small_predictor") == "own" and not kind.has_predictor:
        raise UsageError(
            f"{base} has no predictor, so its small views have none of their own; leave small_predictor out"
        )
    values["local"] = build(LocalConfig, local, "field of the local term") if co else None
    values["options"] = options
    config = build(Config, values, KIND)
    make_method(base, **options)  # a wrong option is told before the data are opened
    return config


def _neutral(arch: Any) -> dict[str, Any]:
    """Stem and width for a network that is no ResNet: those of a preset are meant for its own."""
    if not isinstance(arch, str) or _scalable(arch):
        return {}
    return {"width": 64} | ({} if takes_stem(arch) else {"stem": "imagenet"})


def _scalable(arch: str) -> bool:
    """Whether a network comes in any width."""
    arch = arch.removeprefix("torchvision:")
    return arch in SCALABLE or is_rf_resnet(arch)


def _preset_layers(preset: str | None, base: str) -> list[dict[str, Any]]:
    if preset is None:
        return []
    common = dict(_shipped(preset))
    methods: dict[str, dict[str, Any]] = common.pop("methods", {})
    parent = common.pop("like", None)
    layers = _preset_layers(parent, base) if parent else []
    return [*layers, common, methods.get(base, {})]


@cache
def _shipped(preset: str) -> Mapping[str, Any]:
    """What the file of a preset says; read once, as a sweep asks for it in each of its runs."""
    if preset not in presets():
        raise unknown_name("preset", preset, presets())
    path = resources.files("coss_eval.training").joinpath("presets", f"{preset}.yaml")
    found: Mapping[str, Any] = yaml.safe_load(path.read_text())
    return found
