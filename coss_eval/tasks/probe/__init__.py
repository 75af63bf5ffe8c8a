"""How much of the classes a frozen representation knows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from coss_eval.errors import UsageError, unknown_name
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.flags import Floats

Protocol = Literal["lbfgs", "sgd"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
OF_SGD = ("epochs", "lr", "bf16", "sgd_batch", "momentum", "crop_min_scale", "flip")


@dataclass(frozen=True)
class ProbeOptions:
    """Linear probe, few-label probes and kNN on the frozen global representation; or the field's probe by SGD.

    lbfgs: logistic regression to its optimum on features of the images as they are, its strength chosen on a tenth of
    the (labelled) training images (Kolesnikov et al. 2019), with few labels too; and kNN as in DINO (Caron et al.
    2021). sgd: a linear layer trained by SGD on random resized crops and flips (no weight decay, cosine), the last
    epoch scored. Both in one --out folder stand beside each other in its report, under names of their own.
    """

    fractions: Floats = (0.01, 0.1)
    "Shares of the labels that few-label probes of lbfgs get, balanced over classes and seeded."
    draws: int = 5
    "Number of label sets that each few-label probe is fitted on: intervals are about new label sets and new images."
    k: int = 20
    "Number of neighbours of kNN."
    temperature: float = 0.07
    "Of kNN: a neighbour at cosine c votes with exp(c / temperature)."
    protocol: Protocol = "lbfgs"
    "lbfgs or sgd, as said above."
    epochs: int | None = None
    "Of sgd [default: 90]."
    lr: Floats = ()
    """Learning rates of sgd for a batch of 256, trained side by side, the best chosen on held-out training images;
    where it is the smallest or largest, four beyond it are trained as well, at the cost of a second training. One alone
    is trained on all training images (--lr 0.1 is MoCo v3's protocol) [default: ten from 0.001 to 30]."""
    bf16: bool = False
    "Run the network in bfloat16 on sgd's training views: faster on GPUs, and part of the protocol."
    sgd_batch: int | None = None
    "Images per step of sgd [default: 1024]."
    momentum: float | None = None
    "Of sgd [default: 0.9]."
    crop_min_scale: float | None = None
    "Smallest share of the image's area in sgd's random crops [default: 0.08]."
    flip: float | None = None
    "Probability that sgd flips an image [default: 0.5]."

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol of the probe", self.protocol, PROTOCOLS)
        if self.draws < 1:
            raise UsageError(f"expected one label set or more (--draws), got {self.draws}")
        if any(not 0 < fraction <= 1 for fraction in self.fractions):
            shown = ", ".join(f"{fraction:g}" for fraction in self.fractions)
            raise UsageError(f"expected fractions above 0 and at most 1, got {shown}")
        if self.k < 1 or not 0 < self.temperature < math.inf:
            raise UsageError(f"expected k of 1 or more and a temperature above 0, got {self.k} and {self.temperature}")
        if self.protocol != "sgd" and (given := self.of_sgd()):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{flags} belong to --protocol sgd; add it, or leave them out")

    def of_sgd(self) -> dict[str, Any]:
        """The options given for sgd, by name."""
        defaults = {field.name: field.default for field in fields(ProbeOptions)}
        return {name: value for name in OF_SGD if (value := getattr(self, name)) != defaults[name]}


ENTRY = TaskEntry(
    name="probe",
    about="linear probe, few-label probes and kNN on the frozen global representation",
    source="Kolesnikov et al. 2019; Caron et al. 2021",
    options=ProbeOptions,
    home="coss_eval.tasks.probe.task:Probe",
    order=10,
)
