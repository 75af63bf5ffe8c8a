"""FGSM is run at each eps for itself: against a version written by hand, whatever the list, backend and batch size."""

from __future__ import annotations

import pytest
import torch
from attacked import Digits
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks import Verdicts

EPS = {"linf": [0.01, 0.03, 0.06, 0.12, 0.3], "l2": [0.1, 0.3, 0.6, 1.2, 3.0]}


def by_hand(network: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: str) -> Tensor:
    """bool (B,): right without and under one step of eps up the cross-entropy, in float64."""
    network, images = network.double(), images.double().requires_grad_()
    logits = network(images)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), images)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = gradient.sign() if norm == "linf" else gradient / length
    moved = (images.detach() + eps * step).clamp(0, 1)
    stands = (logits.argmax(1) == labels) & (network(moved).argmax(1) == labels)
    network.float()
    return stands


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fgsm_at_each_eps_is_the_one_written_by_hand(
    norm: str, backend: str, network: nn.Module, digits: Digits
) -> None:
    images, labels, _ = digits
    result = attacks.fgsm(network, images, labels, EPS[norm], norm, backend=backend)
    assert not result.swept
    for eps, stands in zip(EPS[norm], result.robust, strict=True):
        differ = stands != by_hand(network, images, labels, eps, norm)
        assert differ.double().mean() <= 0.01  # float32 rounding, where the network is undecided
        assert torch.equal(stands, attacks.fgsm(network, images, labels, eps, norm, backend=backend).robust[0])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_images_of_each_eps(batch_size: int, networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, _ = digits
    network = networks["perceptron"]
    result = attacks.fgsm(network, images, labels, EPS["linf"], batch_size=batch_size)
    for level, eps in enumerate(EPS["linf"]):
        pixels = result.adversarial(level)
        assert (pixels - images).abs().max() <= eps + 1e-6
        with torch.no_grad():
            stands = network(pixels).argmax(1) == labels
        assert torch.equal(stands & result.clean, result.robust[level])


@pytest.mark.parametrize("sharpness", [1.0, 1e3])
def test_a_confident_network_does_not_hide_its_gradient(
    sharpness: float, networks: dict[str, nn.Module], digits: Digits
) -> None:
    """Logits times 1000: the float32 cross-entropy of most images is 0 and its gradient vanishes, its sign does not."""

    class Sharp(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return networks["perceptron"](pixels) * sharpness

    images, labels, _ = digits
    pixels = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(Sharp()(pixels), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    vanished = (gradient.flatten(1).abs().amax(1) == 0).double().mean()
    assert (vanished > 0.5) == (sharpness > 1)
    result = attacks.fgsm(Sharp(), images, labels, EPS["linf"])
    assert result.zero_gradients == 0
    expected = attacks.fgsm(networks["perceptron"], images, labels, EPS["linf"])
    assert (result.robust != expected.robust).double().mean() <= 0.02  # among classes the loudest one leads


def test_verdicts_that_are_not_monotone() -> None:
    robust = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    clean = torch.ones(3, dtype=torch.bool)
    verdicts = Verdicts("fgsm", "linf", (0.1, 0.2, 0.3), clean, robust, swept=False)
    assert verdicts.smallest_eps.tolist() == [0.2, 0.1, float("inf")]
    asked: list[tuple[float, list[int]]] = []

    def again(eps: float, rows: Tensor) -> Tensor:
        asked.append((eps, rows.tolist()))
        return torch.ones(len(rows), dtype=torch.bool)

    assert torch.equal(verdicts.minimum(again).robust, robust)
    assert sorted(asked) == [(0.1, [0, 2]), (0.2, [1, 2]), (0.3, [0, 1, 2])]
    assert not verdicts.minimum(again).swept
    assert not Verdicts.joined([verdicts, verdicts]).swept
    assert not verdicts.among(torch.tensor([0])).swept


def test_foolbox_attacks_of_one_step_are_not_swept(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, _ = digits
    for name, swept in (("LinfFastGradientAttack", False), ("LinfBasicIterativeAttack", True)):
        result = attacks.Foolbox(attack=name)(networks["perceptron"], images, labels, EPS["linf"])
        assert result.swept == swept
