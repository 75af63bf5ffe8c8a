"""A configuration bound to data and a device: what is trained, on which images, with which views."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coss_eval.checkpoints.load import make_model
from coss_eval.data.batches import Geometry
from coss_eval.data.dataset import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.models.architecture import built_for_a_side
from coss_eval.models.classifier import Preprocessing, training_format
from coss_eval.models.model import Model
from coss_eval.randomness import seeded_init
from coss_eval.training.config import Config
from coss_eval.training.feed import BatchPart, Feed, statistics
from coss_eval.training.optim import make_optimizer, parameter_groups
from coss_eval.training.pretraining import Pretraining
from coss_eval.training.sync_norm import synchronised
from coss_eval.views.make import ViewParameters, Views, apply


class Setup:
    """The objective, its views and the feed of its images; ``classes`` are the data's names."""

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        self.config, self.device, self.classes = config, device, data.classes
        self.fit, self.select = _parts(data, config.holdout)
        size = _size(config, self.fit)
        self.geometry = None if self.fit.native_size is not None else Geometry(size)
        self.views: Views = config.kind.views.at(
            size,
            variant=config.recipe,
            crop_min_scale=config.crop_min_scale,
            small_views=config.small_views,
            small_size=config.small_size,
        )
        self.feed = Feed(self.fit, config.batch_size, device, seed=config.seed, views=self.views)
        share, accumulate = self.feed.share, config.accumulate
        if share % accumulate or share // accumulate < 2:
            raise UsageError(
                f"a process's {share} images of a batch do not divide into {accumulate} micro-batches of two or more; "
                "change batch_size or accumulate"
            )
        self.model = self._model(size)
        self.format = training_format(self.model.backbone, device)
        self.objective = self._objective()
        self.total = self.feed.steps * config.epochs

    def _model(self, size: int) -> Model:
        config = self.config
        preprocessing = Preprocessing(
            said_by="checkpoint", img_size=None if self.fit.native_size == (size, size) else size
        )
        if config.normalise == "data":
            mean, std = statistics(self.fit, self.geometry)
            preprocessing = replace(preprocessing, mean=mean, std=std)
        model = make_model(
            config.arch,
            stem=config.stem,
            width=config.width,
            img_size=size if built_for_a_side(config.arch, size) else None,
            pooling=config.pooling,
            preprocessing=preprocessing,
            name=config.method,
            seed=config.seed,
        )
        only = model.backbone.img_size
        if only is not None and any(view.size != only for view in self.views):
            raise UsageError(f"{config.arch} takes {only} px only; leave small_views at 0 and size at {only}")
        return model

    def _objective(self) -> Pretraining:
        config = self.config
        self.model.backbone.requires_grad_(True)
        method = config.make_method(len(self.classes))
        own = config.small_predictor == "own" and method.has_predictor and bool(self.views.small)
        with seeded_init(config.seed + 1):
            made = Pretraining(
                self.model.backbone,
                method,
                config.local,
                small_predictor=own,
                bf16=config.precision == "bf16",
                compile=config.compile and self.device.type == "cuda",
                seed=config.seed,
            )
        synchronised(made.to(self.device), self.device)
        for branch in (made, made.target):
            if branch is not None:
                branch.backbone.to(memory_format=self.format)
        return made.train()

    def views_of(self, part: BatchPart, epoch: int) -> list[Tensor]:
        """All views of a batch, normalised, on the device."""
        return self.make(part.pixels, part.draws(self.views, seed=self.config.seed, epoch=epoch))

    def make(self, pixels: Sequence[Tensor], drawn: Sequence[ViewParameters]) -> list[Tensor]:
        """The views by what was drawn for each, of the images or of a crop for every view."""
        p = self.model.preprocessing
        images = pixels if len(pixels) > 1 else [pixels[0]] * len(drawn)
        return [
            apply(each, draw, mean=p.mean, std=p.std).contiguous(memory_format=self.format)
            for each, draw in zip(images, drawn, strict=True)
        ]

    def optimizer(self) -> torch.optim.Optimizer:
        config, objective = self.config, self.objective
        constant = objective.predictors if objective.method.constant_predictor else []
        groups = parameter_groups(self.objective, config.weight_decay, constant=constant, vector_scale=config.vector_lr)
        options: dict[str, Any] = {} if config.optimizer == "adamw" else {"momentum": config.momentum}
        if config.optimizer == "lars":
            options |= {"trust": config.trust, "clip": config.clip_trust}
        return make_optimizer(config.optimizer, groups, lr=config.peak_lr, **options)

    def snapshot(self) -> Model:
        """A copy of the network that the method hands on, in eval mode, with its head where the method makes one.

        A copy, since an evaluation changes the memory format of what it is given, which training depends on.
        """
        head = self.objective.heads.projector if self.config.kind.targets == "labels" else None
        backbone, head = deepcopy((self.objective.kept, head))
        for module in (backbone, head):
            if module is not None:
                module.eval().requires_grad_(False)
        classes = self.classes if head is not None else None
        known = replace(self.model, group=self.config.method, seed=self.config.seed, recipe=self.config.digest())
        made = replace(known, backbone=backbone, head=head, classes=classes, layout="coss-eval")
        return made.identified()


def _parts(data: Dataset, holdout: float) -> tuple[Split, Split | None]:
    if data.train is None:
        raise UsageError(f"{data.name} has no training split; give a dataset with train/ and val/ or test/")
    if holdout == 0:
        return data.train, None
    return data.train.holdout(holdout)


def _size(config: Config, split: Split) -> int:
    native = split.native_size
    if config.size is not None:
        return config.size
    if native is None or native[0] != native[1]:
        raise UsageError("the images have no common square size: say the size of the views in pixels (size: 224)")
    return native[0]
