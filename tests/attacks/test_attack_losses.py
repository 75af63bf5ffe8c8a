"""The losses against their definitions, and what makes them fit to be climbed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coss_eval.attacks.losses import cross_entropy, dlr, margins, parse_losses, targeted_dlr
from coss_eval.errors import UsageError

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(64, 7, generator=GENERATOR)
LABELS = torch.randint(7, (64,), generator=GENERATOR)


def test_cross_entropy_is_softplus_of_ours() -> None:
    expected = F.cross_entropy(LOGITS, LABELS, reduction="none")
    torch.testing.assert_close(F.softplus(cross_entropy(LOGITS, LABELS)), expected)


def test_the_gradient_points_as_cross_entropy_does() -> None:
    logits = LOGITS.clone().requires_grad_()
    (ours,) = torch.autograd.grad(cross_entropy(logits, LABELS).sum(), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, LABELS, reduction="sum"), logits)
    torch.testing.assert_close(F.normalize(ours), F.normalize(plain))


def test_the_gradient_survives_confidence() -> None:
    logits = torch.tensor([[400.0, 0.0, 1.0]], requires_grad=True)
    label = torch.tensor([0])
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, label), logits)
    (ours,) = torch.autograd.grad(cross_entropy(logits, label).sum(), logits)
    assert not plain.any()
    torch.testing.assert_close(ours.sum(), torch.tensor(0.0))
    assert ours[0, 0] == -1


def test_margins_are_negative_exactly_where_the_class_is_wrong() -> None:
    assert torch.equal(margins(LOGITS, LABELS) < 0, LOGITS.argmax(1) != LABELS)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_dlr_knows_neither_scale_nor_shift(scale: float, shift: float) -> None:
    targets = (LABELS + 1) % 7
    logits = LOGITS * scale + shift
    torch.testing.assert_close(dlr(logits, LABELS), dlr(LOGITS, LABELS), rtol=1e-3, atol=1e-4)
    expected = targeted_dlr(LOGITS, LABELS, targets)
    torch.testing.assert_close(targeted_dlr(logits, LABELS, targets), expected, rtol=1e-3, atol=1e-4)


def test_dlr_by_hand() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0]])
    torch.testing.assert_close(dlr(logits, torch.tensor([0])), torch.tensor([-(5 - 3) / (5 - 1)]))
    torch.testing.assert_close(dlr(logits, torch.tensor([2])), torch.tensor([-(1 - 5) / (5 - 1)]))
    expected = torch.tensor([-(5.0 - 3.0) / (5 - (1 + 0) / 2)])
    torch.testing.assert_close(targeted_dlr(logits, torch.tensor([0]), torch.tensor([1])), expected)


@pytest.mark.parametrize(
    ("loss", "classes", "targeted", "match"),
    [
        ("dlr", 2, False, "at least 3 classes"),
        ("ce+dlr", 3, True, "at least 4 classes"),
        ("cee", 10, False, "did you mean ce"),
    ],
)
def test_losses_that_do_not_fit(loss: str, classes: int, targeted: bool, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_losses(loss, classes, targeted=targeted)


def test_losses_by_name() -> None:
    assert parse_losses("ce+dlr", 3, targeted=False) == ("ce", "dlr")
