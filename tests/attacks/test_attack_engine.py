"""The sweep: a full batch while there are images, never an empty one, and nothing computed for what is decided."""

from __future__ import annotations

import pytest
import torch
from attacked import Digits
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks.gradient import steps_since_check
from coss_eval.attacks.square import sides
from coss_eval.errors import UsageError

EPS = [0.01, 0.03, 0.06, 0.12]


class Counts(nn.Module):
    """Notes the size of every batch that comes by."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, pixels: Tensor) -> Tensor:
        assert len(pixels) > 0
        self.sizes.append(len(pixels))
        return self.network(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_the_batch_is_full_while_images_wait(batch_size: int, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = (part[:80] for part in digits)
    counted = Counts(network)
    result = attacks.pgd(counted, images, labels, EPS, ids, steps=5, batch_size=batch_size)
    clean_passes = -(-len(images) // batch_size)
    attacking = counted.sizes[clean_passes:]
    assert attacking[0] == min(batch_size, int(result.clean.sum()))
    assert attacking == sorted(attacking, reverse=True)  # refilled until none wait, and only then smaller
    assert sum(attacking) <= int(result.clean.sum()) * len(EPS) * 6


def test_nothing_is_forwarded_that_is_decided(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    network = networks["convnet"]
    with torch.no_grad():
        wrong = network(images).argmax(1) != labels
    counted = Counts(network)
    result = attacks.pgd(counted, images[wrong], labels[wrong], EPS, ids[wrong])
    assert counted.sizes == [int(wrong.sum())]  # the clean pass alone
    assert not result.robust.any()
    assert torch.equal(result.adversarial(-1), images[wrong])

    counted = Counts(network)
    attacks.pgd(counted, images, labels, EPS, ids)
    worst = int((~wrong).sum()) * len(EPS) * 21
    assert sum(counted.sizes) - len(images) < 0.3 * worst  # this network breaks at once


def test_an_image_stops_where_it_breaks(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    network = networks["perceptron"]
    sweep = attacks.pgd(network, images, labels, EPS, ids, steps=10)
    for level, eps in enumerate(EPS):
        alone = attacks.pgd(network, images, labels, eps, ids, steps=10)
        assert (sweep.robust[level] <= alone.robust[0]).all()  # at least as strong, for the smaller eps before it
        first = sweep.robust[level - 1] if level else sweep.clean
        assert torch.equal(sweep.robust[level], alone.robust[0] & first)  # and by nothing else


def test_smallest_eps(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    result = attacks.pgd(networks["perceptron"], images, labels, EPS, ids)
    for row, smallest in enumerate(result.smallest_eps.tolist()):
        standing = [bool(result.clean[row]), *result.robust[:, row].tolist()]
        levels = [0.0, *EPS, float("inf")]
        assert smallest == levels[standing.index(False) if False in standing else len(EPS) + 1]
    assert EPS[0] < result.median_eps <= EPS[-1]
    assert result.robust_accuracy == [pytest.approx(v) for v in result.robust.double().mean(1).tolist()]


def test_margins_tell_the_verdicts(network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    result = attacks.pgd(network, images, labels, EPS, ids)
    assert result.margin is not None
    assert torch.equal(result.margin >= 0, result.robust)
    assert (result.margin[1:] <= result.margin[:-1]).all()


def test_the_caller_may_have_switched_gradients_off(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    expected = attacks.pgd(networks["convnet"], images, labels, EPS, ids).robust
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            inside = images.clone()  # an inference tensor in the second round
            assert torch.equal(attacks.pgd(networks["convnet"], inside, labels, EPS, ids).robust, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autocast_leaves_the_pixels_in_float32(norm: str, networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attacks.pgd(networks["convnet"], images, labels, EPS, ids, norm)
        pixels = result.adversarial(-1)
    assert pixels.dtype == torch.float32
    moved = (pixels - images).flatten(1)
    assert ((moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)) <= EPS[-1] + 1e-6).all()


def test_channels_last_images_stay_so(networks: dict[str, nn.Module], digits: Digits) -> None:
    class Layout(Counts):
        def forward(self, pixels: Tensor) -> Tensor:
            assert pixels.is_contiguous(memory_format=torch.channels_last)
            return super().forward(pixels)

    images, labels, ids = digits
    network = Layout(networks["convnet"])
    for attack in (attacks.PGD, attacks.APGD, attacks.Square):
        attack(steps=5)(network, images.contiguous(memory_format=torch.channels_last), labels, EPS, ids=ids)


def test_apgd_is_at_least_pgd(network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    for norm, eps in (("linf", 0.03), ("l2", 0.6)):
        pgd = attacks.pgd(network, images, labels, eps, ids, norm, steps=30).robust_accuracy[0]
        apgd = attacks.APGD(norm=norm, steps=30)(network, images, labels, eps, ids=ids).robust_accuracy[0]
        assert apgd <= pgd + 0.01


def test_checkpoints_are_those_of_autoattack() -> None:
    """The paper's: w_j = ceil(p_j N) with p = 0, .22, .41, .57, .70, .80, .87, .93, .99."""
    assert [step for step, since in enumerate(steps_since_check(100)) if since] == [22, 41, 57, 70, 80, 87, 93, 99]


def test_squares_shrink_as_published() -> None:
    published = sides(10_000, 0.8, 32, 32)
    assert published[0] == round((0.8 * 32 * 32) ** 0.5)
    assert list(published) == sorted(published, reverse=True)
    assert published[11] == round((0.4 * 32 * 32) ** 0.5)
    assert published[-1] == round((0.8 * 0.5**9 * 32 * 32) ** 0.5)
    assert min(sides(20, 0.8, 2, 2)) == 1


class Rounds(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.detach().round()


class Frozen(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)


def test_a_network_without_gradient_is_named(networks: dict[str, nn.Module], digits: Digits) -> None:
    images, labels, ids = digits
    cut = nn.Sequential(nn.Identity(), Rounds(), networks["convnet"])
    with pytest.raises(UsageError, match=r"module '1' \(Rounds\) passes no gradient on"):
        attacks.pgd(cut, images, labels, EPS, ids)
    with pytest.raises(UsageError, match=r"runs under torch\.no_grad"):
        attacks.fgsm(Frozen(networks["convnet"]), images, labels, EPS)
    assert not any(m._forward_hooks for m in cut.modules())
    assert attacks.Square(steps=5)(cut, images, labels, EPS, ids=ids).robust.shape == (4, len(images))
