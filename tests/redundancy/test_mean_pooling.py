"""What redundancy before pooling can cause: nothing seen from outside, where the global is a mean of the locals.

Mixing each local with its image's mean drives redundancy to 1 and leaves every logit and every gradient as it was, so
no result under image corruptions or attacks can depend on it; damage inside the network can.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build_networks import build
from small_networks import network, pixels
from torch import Tensor, nn

from coss_eval.attacks import pgd
from coss_eval.corruptions import corrupt
from coss_eval.errors import UsageError
from coss_eval.internal import corrupted, mixed
from coss_eval.models.backbone import Backbone
from coss_eval.models.classifier import Classifier, Preprocessing, to_float
from coss_eval.redundancy import measure, mixing_weight

MEAN_POOLED = ["cnn", "cnn+mlp", "nhwc", "mean tokens"]
REAL: dict[str, dict[str, Any]] = {
    "resnet18": {"stem": "cifar", "width": 8},
    "rf29_resnet18": {"stem": "cifar", "width": 8},
    "vit_d24_l2_h2_p8": {"img_size": 32, "pooling": "mean"},
}
IDS = torch.arange(24)


def made(family: str) -> tuple[Backbone, int]:
    """The network, and the side in pixels of its images."""
    return (network(family), 16) if family in MEAN_POOLED else (build(family, **REAL[family])[0].eval(), 32)


def classifier(backbone: Backbone, side: int = 16) -> Classifier:
    torch.manual_seed(0)
    dim = backbone(pixels(1, size=side)).shape[1]
    return Classifier(backbone, nn.Linear(dim, 5), Preprocessing((0.5,) * 3, (0.3,) * 3), origin="a test's").eval()


def images(side: int = 16) -> Tensor:
    """uint8 (24, 3, side, side)."""
    return ((pixels(24, size=side) * 0.2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def redundancy(backbone: Backbone, side: int = 16) -> float:
    table = measure(backbone, [to_float(images(side))]).set_index("metric")["value"]
    return float(table["normalised"])


@pytest.mark.parametrize("family", [*MEAN_POOLED, *REAL])
def test_mixing_makes_redundancy_and_changes_nothing_from_outside(family: str) -> None:
    backbone, side = made(family)
    model, labels = classifier(backbone, side), torch.arange(24) % 5
    noisy = to_float(corrupt(images(32), "gaussian_noise", 3, IDS, table="cifar"))  # which takes 32 px or more
    noisy = noisy if side == 32 else nn.functional.avg_pool2d(noisy, 2)

    def seen() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of clean and of corrupted images, the gradient that attacks follow, verdicts under PGD."""
        clean = to_float(images(side)).requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(clean), labels), clean)
        attacked = pgd(model, to_float(images(side)), labels, [2 / 255, 8 / 255], IDS, steps=3)
        return model(clean).detach(), model(noisy).detach(), gradient, attacked.robust

    before, redundant = seen(), [redundancy(backbone, side)]
    for weight in (0.5, 0.999):
        with mixed(backbone, weight):
            *now, robust = seen()
            for each, then in zip(now, before[:3], strict=True):
                torch.testing.assert_close(each, then, rtol=1e-4, atol=2e-5 * float(then.abs().max()) + 1e-7)
            assert (robust == before[3]).float().mean() > 0.95  # verdicts within rounding of the boundary may flip
            redundant.append(redundancy(backbone, side))
    assert redundant == sorted(redundant)
    assert redundant[-1] > 0.99 > redundant[0]


def test_damage_inside_is_where_mixing_shows() -> None:
    """Masked locations move the global of a network less the more alike its locals are."""
    backbone = network("cnn")
    x, moved = to_float(images()), []
    for weight in (0.0, 0.9):
        with torch.no_grad(), mixed(backbone, weight):
            clean = backbone(x)
            with corrupted(backbone, "prepool", "location", 0.5, IDS, 0):
                moved.append(float((backbone(x) - clean).norm()))
    assert moved[1] < 0.2 * moved[0]


def test_a_network_that_does_not_pool_by_the_mean_is_changed() -> None:
    """What the proposition needs: a maximum over locations does see the mixing."""
    backbone = network("cnn")
    backbone.pool = lambda features: features.amax((2, 3))  # type: ignore[method-assign]
    with torch.no_grad():
        before = backbone(to_float(images()))
        with mixed(backbone, 0.99):
            assert (backbone(to_float(images())) - before).abs().max() > 0.05


@pytest.mark.parametrize("family", [*MEAN_POOLED, "rf29_resnet18"])
def test_the_weight_that_gives_a_redundancy_gives_it(family: str) -> None:
    backbone, side = made(family)
    wanted = 0.5 * (1 + redundancy_per_position(backbone, side))
    with torch.no_grad():
        weight = mixing_weight(backbone.represent(to_float(images(side))).local, wanted)
    with mixed(backbone, weight):
        assert redundancy_per_position(backbone, side) == pytest.approx(wanted, abs=1e-4)


def redundancy_per_position(backbone: Backbone, side: int) -> float:
    table = measure(backbone, [to_float(images(side))]).set_index("metric")["value"]
    return float(table["normalised_per_position"])


def test_what_cannot_be_mixed_is_one_line() -> None:
    local = torch.randn(8, 4, 3) + 3 * torch.randn(8, 1, 3)
    for wanted in (0.01, 1.0):
        with pytest.raises(UsageError, match="mixing raises it to below 1"):
            mixing_weight(local, wanted)
    with pytest.raises(UsageError, match="images, locations, units"):
        mixing_weight(local[:, :1], 0.9)
    with pytest.raises(UsageError, match="from 0 to 1, got 2"), mixed(network("cnn"), 2.0):
        pass
