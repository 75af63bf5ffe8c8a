"""What is evaluated: a backbone with its weights, its own head if it has one, and what it expects of its input."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coss_eval.errors import CossError, shown
from coss_eval.models.backbone import Backbone
from coss_eval.models.choices import HeadChoice
from coss_eval.models.classifier import Classifier, Preprocessing
from coss_eval.randomness import seeded_init
from coss_eval.runtime.code_identity import code_identity
from coss_eval.runtime.live import facts_html

if TYPE_CHECKING:  # it builds networks, and their builder needs seeded_init
    from coss_eval.models.architecture import Architecture


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a checkpoint met those of the network; printed before every run and kept in run.json."""

    layout: str
    branch: str | None  # student, teacher, online, target; None where the layout has one network only
    branches: tuple[str, ...]  # those that the file holds
    arch: str
    inferred: tuple[str, ...]  # what was read off the tensors' shapes: "arch", "stem", "width", "img_size"
    matched: int
    missing: tuple[str, ...] = ()  # in the network, not in the file
    unexpected: tuple[str, ...] = ()  # in the file's branch, not in the network (projection heads, ...)
    head: str | None = None  # "fc: 512 to 10 classes"; None where no classifier head was found
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as plain lines for a terminal."""
        inferred = f" ({', '.join(self.inferred)} inferred from the shapes)" if self.inferred else ""
        branch = f", branch {self.branch} of {', '.join(self.branches)}" if len(self.branches) > 1 else ""
        return [
            f"layout      {self.layout}{branch}",
            f"arch        {self.arch}{inferred}",
            f"keys        {self.matched} matched, {named(self.missing)} missing, {named(self.unexpected)} unexpected",
            f"head        {self.head or 'none found: a probe will be fitted'}",
            *(f"note        {note}" for note in self.notes),
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """A network ready to be evaluated, in eval mode.

    ``classes`` names the outputs of ``head`` in their order, where the file or the weights say them.
    ``architecture`` is what builds the same network afresh; None for a network that somebody made by hand.
    ``code`` identifies code that is not the packages' (see ``code_identity``), ``batch_size`` the batches of a network
    whose outputs depend on them; both are None for ordinary networks, and stand in every key where they are not.
    ``group`` is the method that trained it, ``seed`` its training seed and ``recipe`` a digest of all else that it was
    trained with, where known: reports compare groups.
    """

    name: str
    arch: str
    backbone: Backbone
    head: nn.Module | None
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    sha256: str
    layout: str
    report: KeyReport | None = None
    head_choice: HeadChoice = "auto"
    architecture: Architecture | None = None
    code: str | None = None
    batch_size: int | None = None
    group: str | None = None
    seed: int | None = None
    recipe: str | None = None

    def training(self) -> dict[str, Any]:
        """What is known of group, seed and recipe, for files and records; no part of any key."""
        known = {"group": self.group, "seed": self.seed, "recipe": self.recipe}
        return {name: value for name, value in known.items() if value is not None}

    def __repr__(self) -> str:
        head = "no head" if self.head is None else f"its own {type(self.head).__name__} head"
        normalised = self.preprocessing.source
        return f"Model({self.name}: {self.arch}, {self.backbone.dim} features, {head}, normalisation {normalised})"

    def _repr_html_(self) -> str:
        """In a notebook: what it is, where its numbers can be taken, and what its file had."""
        parameters = sum(p.numel() for p in self.backbone.parameters())
        facts = {
            "architecture": f"{self.arch}, {parameters / 1e6:.2f} M parameters",
            "representation": f"{self.backbone.dim} features; sites {', '.join(self.backbone.sites)}",
            "head": "none" if self.head is None else f"its own {type(self.head).__name__}",
            "classes": "not named" if self.classes is None else f"{len(self.classes)}: {shown(self.classes, 6)}",
            "normalisation": self.preprocessing.source,
            "weights (sha256)": self.sha256[:16],
        }
        if self.report is not None:
            lines = (line.partition(" ") for line in self.report.lines())
            facts |= {f"file: {name}": text.strip() for name, _, text in lines if name in ("layout", "keys", "note")}
        return facts_html(f"Model {self.name}", facts)

    def protocol(self) -> dict[str, Any]:
        """All that a number depends on, as JSON: the weights themselves, the architecture and the preprocessing."""
        options = self.architecture.options() if self.architecture else {}
        cut = self.backbone.cut if self.backbone.cut > 1 else None
        own = {"code": self.code, "batch_size": self.batch_size, "cut": cut}
        options |= {name: value for name, value in own.items() if value is not None}
        return {"sha256": self.sha256, "arch": self.arch, **options, "preprocessing": self.preprocessing.protocol()}

    def identified(self) -> Model:
        """This model under the identity of what it is now: weights may have been changed in place, and code edited."""
        return replace(self, sha256=weights_sha256(self.backbone, self.head), code=self._code())

    def encoder(self) -> Classifier:
        """Pixels in [0, 1] to global representations: a classifier without a head."""
        return Classifier(self.backbone, nn.Identity(), self.preprocessing, origin="no head")

    def _code(self) -> str | None:
        """Of the factory that made the network, and of every class in it."""
        modules = [module for part in (self.backbone, self.head) if part is not None for module in part.modules()]
        factory = self.arch.partition(":")[0] if ":" in self.arch else None
        own = [factory] if factory in sys.modules else []  # not "timm:NAME" and the like
        return code_identity([*{type(module) for module in modules}, *self.backbone.made_of, *own])

    def untrained(self, seed: int = 0) -> Model:
        """The same architecture with random weights of its own initialisation, drawn from ``seed``, and no head."""
        if self.architecture is None:
            raise CossError(f"{self.name}: how to build {self.arch} afresh is not known; load it with load_model")
        with seeded_init(seed):
            backbone = self.architecture.backbone()
        device = next(self.backbone.parameters()).device
        return replace(
            self,
            name=f"untrained {self.arch} (seed {seed})",
            group=None,
            seed=None,
            recipe=None,
            backbone=backbone.to(device).eval().requires_grad_(False),
            head=None,
            classes=None,
            sha256=weights_sha256(backbone, None),
            layout="untrained",
            report=None,
            head_choice="probe",
        )


def weights_sha256(backbone: nn.Module, head: nn.Module | None) -> str:
    """Identity of the weights in use: the same tensors give the same hash, however a file wraps or names them.

    Counters of seen batches are left out: they change no output, and some frameworks drop them.
    """
    tensors: dict[str, Tensor] = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    if head is not None:
        tensors |= {f"head.{key}": value for key, value in head.state_dict().items()}
    digest = hashlib.sha256()
    for key in sorted(tensors):
        if key.endswith("num_batches_tracked"):
            continue
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named(keys: tuple[str, ...], show: int = 3) -> str:
    """ "0", "2 (a, b)", "40 (a, b, c, ...)": a count of keys with the first few of them."""
    if not keys:
        return "0"
    rest = ", ..." if len(keys) > show else ""
    return f"{len(keys)} ({', '.join(keys[:show])}{rest})"
