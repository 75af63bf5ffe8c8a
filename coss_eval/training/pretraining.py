"""The training objective as one module, views in and losses out: networks, heads, global and local term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from coss_eval.errors import UsageError
from coss_eval.models.backbone import Backbone, Site, as_locations
from coss_eval.models.hooks import captured, find_site
from coss_eval.models.trial import evaluating
from coss_eval.training.local import Draw, LocalConfig, LocalTerm, choose, regional
from coss_eval.training.method import Method
from coss_eval.training.optim import ema_update

RANDOM_LAYERS = frozenset({"Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "StochasticDepth", "DropPath"})


class Losses(NamedTuple):
    total: Tensor
    global_: Tensor
    local: Tensor | None  # None without the CO term


class Encoded(NamedTuple):
    """One view: the map where targets are pooled, the map where locals are taken, and the global (B, D')."""

    features: Tensor
    site: Tensor
    global_: Tensor


class Targets(NamedTuple):
    """What one full view sets as targets."""

    global_: Tensor  # (B, P)
    local: Tensor | None  # (B, R, P), through the local term's projector


class Branch(nn.Module):
    """A backbone with the projectors of both terms: what makes targets, the online network or its momentum copy."""

    def __init__(self, backbone: Backbone, projector: nn.Module, local_projector: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projector, self.local_projector = backbone, projector, local_projector


class Pretraining(nn.Module):
    """A method, with or without the CO term, around a backbone.

    The target network starts as a copy of the online one, projectors included, takes its own batch statistics in train
    mode, and gets no gradient. Every view is forwarded on its own, since one BatchNorm over several views is another
    method. With ``small_predictor`` small views have a predictor of their own beside that of the full ones, since
    one for both makes multi-crop fail in methods with a predictor (De Plaen et al. 2026, arXiv 2602.05845: MULAN).
    Small views are students only: each meets the targets of all full views.
    With ``bf16`` networks and heads run under autocast, and the losses in float32. ``compile`` is about the
    backbones' features; the backbones themselves stay as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        local: LocalConfig | None = None,
        *,
        small_predictor: bool = False,
        bf16: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if local is not None and method.targets == "labels":
            raise UsageError(f"{method.name} compares no views, so it has no local term; leave co- out")
        self.method, self.bf16, self.seed = method, bf16, seed
        self._map: Any = torch.compile(_map) if compile else _map
        self.backbone = backbone
        self.heads = method.heads(backbone.dim)
        self.compare = method.comparison()
        self.term: LocalTerm | None = None
        if local is not None:
            self.site = find_site(backbone, local.site)
            if self.site.layout == "nc":
                raise UsageError(f"{local.site} has no locations to take locals from; say prepool or a stage")
            self.term = LocalTerm(local, method, local_dim=_width_at(backbone, self.site), dim=backbone.dim)
        self.target: Branch | None = None
        if method.targets == "momentum":
            self.target = deepcopy(self._online()).requires_grad_(False)
        # drawn last: all else starts as it does without
        self.small_predictor = method.predictor() if small_predictor else None

    def train(self, mode: bool = True) -> Self:
        """Train mode for all but the target network's dropout and stochastic depth: its outputs are no draws."""
        super().train(mode)
        if self.target is not None:
            for module in self.target.modules():
                if type(module).__name__ in RANDOM_LAYERS:
                    module.eval()
        return self

    def _online(self) -> Branch:
        """The online network's part that the target network copies."""
        own = self.term.heads if self.term is not None else None
        return Branch(self.backbone, self.heads.projector, own.projector if own is not None else None)

    @property
    def predictors(self) -> list[nn.Module]:
        """Every predictor that is trained, the local term's too."""
        local = self.term.heads if self.term is not None else None
        heads = [self.heads] if local is None else [self.heads, local]
        return [each.predictor for each in heads] + ([] if self.small_predictor is None else [self.small_predictor])

    @property
    def kept(self) -> Backbone:
        """The backbone that the method hands on."""
        return self.target.backbone if self.target is not None and self.method.kept == "target" else self.backbone

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        full: int | None = None,
        ids: Tensor | None = None,
        epoch: int = 0,
    ) -> Losses:
        """The losses of normalised ``views`` (B, 3, S, S), of which the first ``full`` (None: all) set targets.

        ``labels`` (B,) for a supervised method. ``ids`` (B,) and ``epoch`` choose random subsets of locals.
        """
        full = len(views) if full is None else full
        with self._autocast(views[0]):
            encoded = [self._encode(self.backbone, view) for view in views]
            projected = [self.heads.projector(view.global_) for view in encoded]
            online = self._predicted(projected, full)
            targets = self.targets(views[:full], encoded[:full], projected[:full])
            locals_ = self._locals(encoded, ids, epoch)
        global_ = self._global_term(online, targets, labels)
        if self.term is None:
            return Losses(global_, global_.detach(), None)
        local = self._local_term(self.term, locals_, targets)
        weights = self.term.config
        total = weights.global_weight * global_ + weights.local_weight * local
        return Losses(total, global_.detach(), local.detach())

    def _predicted(self, projected: Sequence[Tensor], full: int) -> list[Tensor]:
        """The projected views through the predictor of their kind."""
        predictor = self.heads.predictor
        small = predictor if self.small_predictor is None else self.small_predictor
        return [(predictor if number < full else small)(vectors) for number, vectors in enumerate(projected)]

    def ema(self, tau: float) -> None:
        """Move the target network's parameters: tau of themselves, 1 - tau of the online ones. Buffers are its own."""
        if self.target is not None:
            ema_update(*self._followed, tau)

    @cached_property
    def _followed(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self.target is not None
        return list(self.target.parameters()), list(self._online().parameters())

    def targets(
        self, views: Sequence[Tensor], encoded: Sequence[Encoded], projected: Sequence[Tensor]
    ) -> list[Targets]:
        """The targets that full views set, from the momentum network or from what the online one made of them."""
        if self.method.targets == "labels":
            return []
        if self.target is not None:
            with torch.no_grad():
                return [self._targets_of(self.target, self._encode(self.target.backbone, view)) for view in views]
        online = self._online()
        found = [self._targets_of(online, *pair) for pair in zip(encoded, projected, strict=True)]
        if self.method.targets == "online":
            return found
        return [Targets(t.global_.detach(), None if t.local is None else t.local.detach()) for t in found]

    def _targets_of(self, branch: Branch, view: Encoded, projected: Tensor | None = None) -> Targets:
        projected = branch.projector(view.global_) if projected is None else projected
        if self.term is None:
            return Targets(projected, None)
        regions = self.term.config.regions
        if regions == 1:
            if branch.local_projector is None:
                return Targets(projected, projected[:, None])
            return Targets(projected, branch.local_projector(view.global_)[:, None])
        backbone = branch.backbone
        parts = regional(view.features, regions, backbone.prepool_layout, backbone.prefix_tokens)
        projector = branch.projector if branch.local_projector is None else branch.local_projector
        vectors = projector(backbone.pool(parts))  # (B * R, P)
        return Targets(projected, vectors.view(len(projected), -1, vectors.shape[1]))

    def _encode(self, backbone: Backbone, pixels: Tensor) -> Encoded:
        features, at_site = self._features(backbone, pixels)
        return Encoded(features, at_site, backbone.global_(backbone.pool(features)))

    def _features(self, backbone: Backbone, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The map before pooling, and the map where the local term takes its locals."""
        if self.term is None or self.site.name == "prepool" or backbone is not self.backbone:
            features = self._map(backbone, pixels)
            return features, features
        with captured(backbone, [self.site]) as seen:
            features = self._map(backbone, pixels)
        return features, seen[self.site.name]

    def _locals(self, encoded: Sequence[Encoded], ids: Tensor | None, epoch: int) -> list[Tensor]:
        """Every view's locals through the local term's heads: (B, L, P) each, with L of its own.

        Those of small views go through the same heads as those of full views, and meet the full views' globals.
        """
        if self.term is None:
            return []
        heads = self.term.heads or self.heads
        if ids is None:
            ids = torch.arange(len(encoded[0].global_))
        found = []
        for number, view in enumerate(encoded):
            chosen = choose(view.site, self.term.config, self.site, Draw(ids, self.seed, epoch, number))
            found.append(self.term.online(chosen, heads))
        return found

    def _global_term(self, online: Sequence[Tensor], targets: Sequence[Targets], labels: Tensor | None) -> Tensor:
        index = torch.arange(len(online[0]), device=online[0].device)
        if self.method.targets == "labels":
            if labels is None:
                raise UsageError(f"{self.method.name} needs labels")
            return torch.stack([self.compare(logits, labels, index) for logits in online]).mean()
        pairs = _pairs(len(online), len(targets), "other")
        if self.method.symmetric and len(online) == len(targets):
            pairs = [(s, t) for s, t in pairs if s < t]
        losses = {(s, t): self.compare(online[s], targets[t].global_, index) for s, t in pairs}
        return self._directions(self._weighed(losses, len(targets)))

    def _weighed(self, losses: Mapping[tuple[int, int], Tensor], full: int) -> list[Tensor]:
        """The losses by (online view, target view) whose mean is the term: every direction's, or every kind of view's.

        Every direction weighs the same, as in DINO: with 2 full and 4 small views 2 of 10 are between full ones. Where
        small views have a predictor of their own, each kind of view weighs a half, as in MULAN: its published results
        are of that, and the full views' predictor would have a fifth of the loss otherwise.
        """
        kinds = [[loss for (s, _), loss in losses.items() if (s < full) == whole] for whole in (True, False)]
        if self.small_predictor is None or not all(kinds):
            return list(losses.values())
        return [torch.stack(kind).mean() for kind in kinds]

    def _local_term(self, term: LocalTerm, locals_: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        losses = []
        for s, t in _pairs(len(locals_), len(targets), term.config.view):
            local = targets[t].local
            assert local is not None
            losses.append(term.loss(locals_[s], local))
        return self._directions(losses)

    def _directions(self, losses: list[Tensor]) -> Tensor:
        """The mean over directions, twice that where a method sums its two; so more views do not weigh more."""
        return torch.stack(losses).mean() * (2 if self.method.directions == "sum" else 1)

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.bf16)

    def before_step(self, progress: float) -> None:
        """The methods' own work between backward pass and optimiser."""
        self.method.before_step(self.heads, progress)
        if self.term is not None and self.term.heads is not None:
            self.method.before_step(self.term.heads, progress)

    def after_step(self, progress: float) -> None:
        """The comparisons' own work after the optimiser (DINO's centre and temperature)."""
        self.compare.after_step(progress)
        if self.term is not None:
            self.term.compare.after_step(progress)


def _map(backbone: Backbone, pixels: Tensor) -> Tensor:
    """The map before pooling."""
    features: Tensor = backbone.prepool(backbone.features(backbone.laid_out(pixels)))
    return features


def _pairs(students: int, teachers: int, view: str) -> list[tuple[int, int]]:
    """(online view, target view) for every direction; small views are students only."""
    return [(s, t) for s in range(students) for t in range(teachers) if (s != t) == (view == "other")]


def _width_at(backbone: Backbone, site: Site) -> int:
    """The channels of a site, from one tiny forward pass where it is not the last map."""
    if site.name == "prepool":
        return backbone.local_dim
    side, like = backbone.img_size or 64, next(backbone.parameters())
    with evaluating(backbone), captured(backbone, [site]) as seen:
        backbone(torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype))
    return as_locations(seen[site.name], site.layout, site.prefix_tokens).shape[2]
