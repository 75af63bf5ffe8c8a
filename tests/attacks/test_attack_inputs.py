"""Wrong calls: one line each, for both backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coss_eval import attacks
from coss_eval.errors import UsageError

NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
IMAGES = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # names of tests are made of it
LABELS = torch.tensor([0, 3, 9, 1])
IDS = torch.arange(4)
GOOD = {"images": IMAGES, "labels": LABELS, "eps": [0.1, 0.2], "ids": IDS}

CASES = [
    ({"eps": [0.2, 0.1]}, r"expected eps in rising order, each once, got 0\.2, 0\.1"),
    ({"eps": [0.1, 0.1]}, "rising order"),
    ({"eps": -0.1}, "expected eps of 0 or more"),
    ({"eps": float("nan")}, "expected eps of 0 or more"),
    ({"eps": 8}, "write 8/255, not 8"),
    ({"eps": []}, "at least one eps"),
    ({"eps": -1.0, "norm": "l2"}, "expected eps of 0 or more"),
    ({"norm": "l-inf"}, "unknown norm 'l-inf'; did you mean linf"),
    ({"labels": LABELS + 1}, r"expected labels from 0 to 9 \(the classifier's outputs\), got 1 to 10"),
    ({"labels": LABELS - 1}, "got -1 to 8"),
    ({"labels": LABELS[:3]}, r"expected labels as int64 of shape \(4,\)"),
    ({"labels": LABELS.float()}, r"got torch\.float32"),
    ({"ids": IDS.int()}, "expected ids as int64"),
    ({"targeted": LABELS + 9}, "expected targeted from 0 to 9"),
    ({"images": IMAGES * 2 - 1}, r"expected pixels in \[0, 1\].*normalise inside the classifier"),
    ({"images": IMAGES * torch.nan}, r"expected pixels in \[0, 1\]"),
    ({"images": IMAGES.double()}, r"expected float32 images in \[0, 1\], got torch\.float64; use images\.float\(\)"),
    ({"images": (IMAGES * 255).byte()}, "use to_float"),
    ({"images": IMAGES[0]}, "expected images of shape"),
    ({"images": IMAGES[:0], "labels": LABELS[:0], "ids": IDS[:0]}, "B > 0"),
    ({"steps": 0}, "expected steps of 1 or more, got 0"),
    ({"restarts": 0}, "expected restarts of 1 or more"),
    ({"batch_size": 0}, "expected batch_size of 1 or more"),
    ({"step_size": 0.0}, "expected step_size above 0"),
    ({"rel_step": -1.0}, "expected rel_step above 0, as a share of eps"),
    ({"loss": "dlr+ce2"}, "unknown loss 'ce2'"),
]


@pytest.mark.parametrize(("change", "match"), CASES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_line_errors(change: dict, match: str, backend: str) -> None:
    if backend == "reference" and "loss" in change:
        match = "expected loss 'ce' with the reference backend"
    with pytest.raises(UsageError, match=match) as error:
        attacks.pgd(NETWORK, backend=backend, **(GOOD | change))
    assert "\n" not in str(error.value)


def test_eps_above_one_is_fine_in_l2() -> None:
    assert attacks.pgd(NETWORK, eps=[0.5, 3.0], norm="l2", images=IMAGES, labels=LABELS, ids=IDS).eps == (0.5, 3.0)


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="unknown attack backend 'natve'; did you mean native"):
        attacks.fgsm(NETWORK, IMAGES, LABELS, 0.1, backend="natve")


def test_logits_of_the_wrong_shape() -> None:
    with pytest.raises(UsageError, match=r"expected logits of shape \(B, K\) with K > 1, got \(4, 1\)"):
        attacks.fgsm(nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), IMAGES, LABELS * 0, 0.1)
