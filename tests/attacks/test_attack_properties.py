"""What a trusted attack must show (the reference's list), over attacks, norms and networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attacked import Digits, Normalised
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.attacks import AttackResult

EPS = {"linf": [0.0, 0.01, 0.03, 0.06, 0.12], "l2": [0.0, 0.1, 0.3, 0.6, 1.2]}

Attack = Callable[..., AttackResult]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "fgsm": (lambda n, x, y, e, i, p, **k: attacks.fgsm(n, x, y, e, p, **k), "linf l2"),
    "bim": (lambda n, x, y, e, i, p, **k: attacks.BIM(norm=p)(n, x, y, e, **k), "linf l2"),
    "pgd": (lambda n, x, y, e, i, p, **k: attacks.pgd(n, x, y, e, i, p, steps=10, **k), "linf l2"),
    "pgd-dlr": (lambda n, x, y, e, i, p, **k: attacks.pgd(n, x, y, e, i, p, steps=10, loss="dlr", **k), "linf l2"),
    "apgd": (lambda n, x, y, e, i, p, **k: attacks.APGD(norm=p, steps=12)(n, x, y, e, ids=i, **k), "linf l2"),
    "square": (lambda n, x, y, e, i, p, **k: attacks.Square(steps=30)(n, x, y, e, ids=i, **k), "linf"),
    "foolbox": (
        lambda n, x, y, e, i, p, **k: attacks.pgd(n, x, y, e, i, p, steps=10, backend="reference", **k),
        "linf l2",
    ),
}
CASES = [(name, norm) for name, (_, norms) in ATTACKS.items() for norm in norms.split()]
every_attack = pytest.mark.parametrize(("name", "norm"), CASES)


def size(perturbation: Tensor, norm: str) -> Tensor:
    flat = perturbation.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def same_but_for_ties(one: AttackResult, other: AttackResult, rows: Tensor | slice = slice(None)) -> None:
    """Equal verdicts, except where the network is undecided."""
    differ = one.robust[:, rows] != other.robust
    assert one.margin is not None
    assert not (differ & (one.margin[:, rows].abs() >= 1e-4)).any()


@pytest.mark.slow
@every_attack
def test_1_inside_the_ball_and_the_range(name: str, norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    before = images.clone()
    result = ATTACKS[name][0](network, images, labels, EPS[norm], ids, norm)
    for level, eps in enumerate(EPS[norm]):
        pixels = result.adversarial(level)
        assert (size(pixels - images, norm) <= eps + 1e-6).all()
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        assert pixels.dtype == torch.float32
        with torch.no_grad():  # and it is what the verdict is about
            right = network(pixels).argmax(1) == labels
        assert (right == result.robust[level]).double().mean() >= 0.99
    assert torch.equal(images, before)


@every_attack
def test_2_zero_eps_is_the_identity(name: str, norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    result = ATTACKS[name][0](network, images, labels, 0.0, ids, norm)
    assert torch.equal(result.adversarial(0), images)
    assert torch.equal(result.robust[0], result.clean)
    with torch.no_grad():
        assert torch.equal(result.clean, network(images).argmax(1) == labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_2_one_step_of_pgd_is_the_textbook_fgsm(norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    eps = EPS[norm][3]
    pixels = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network(pixels), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    if norm == "linf":
        by_hand = (images + eps * gradient.sign()).clamp(0, 1)
    else:
        by_hand = (images + eps * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)

    pgd = attacks.pgd(network, images, labels, eps, ids, norm, steps=1, step_size=eps, random_start=False)
    fgsm = attacks.fgsm(network, images, labels, eps, norm)
    assert torch.equal(pgd.adversarial(0), fgsm.adversarial(0))
    assert torch.equal(pgd.robust, fgsm.robust)
    with torch.no_grad():
        right = network(by_hand).argmax(1) == labels
    assert torch.equal(fgsm.robust[0], right & fgsm.clean)
    broken = fgsm.clean & ~right
    assert broken.any()
    # below 1e-5 of its image's largest one a gradient is float32's rounding, and has no sign that could be compared
    signed = gradient.abs() > 1e-5 * gradient.abs().amax((1, 2, 3), keepdim=True)
    compared = broken[:, None, None, None] & (signed if norm == "linf" else torch.ones_like(signed))
    assert (signed | (gradient == 0)).double().mean() > 0.999  # all but a few are compared
    torch.testing.assert_close(fgsm.adversarial(0)[compared], by_hand[compared], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("attack", "norm", "options"),
    [
        ("pgd", "linf", {"steps": 20}),
        ("pgd", "l2", {"steps": 40, "step_size": 0.05}),  # long steps: what is left of the random start decays faster
        ("pgd", "l2", {"steps": 20, "random_start": False}),
        ("apgd", "linf", {"steps": 40}),
        ("apgd", "l2", {"steps": 40}),
    ],
)
def test_3_the_exact_optimum_of_a_linear_network(attack: str, norm: str, options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    weight = torch.randn(2, 48, generator=generator)
    with torch.no_grad():
        network[1].weight.copy_(weight)
        network[1].bias.copy_(torch.tensor([100.0, 0.0]))  # far from the boundary: nothing breaks
    images = 0.4 + 0.2 * torch.rand(8, 3, 4, 4, generator=generator)
    labels = torch.zeros(8, dtype=torch.int64)
    eps = torch.tensor([0.02, 0.05, 0.1])
    attacked = attacks.ATTACKS[attack](norm=norm, **options)
    result = attacked(network, images, labels, eps.tolist(), ids=torch.arange(8))
    slope = (weight[0] - weight[1]).abs().sum() if norm == "linf" else (weight[0] - weight[1]).norm()
    with torch.no_grad():
        logits = network(images)
    assert result.margin is not None
    lowered = (logits[:, 0] - logits[:, 1]) - result.margin  # (E, B)
    torch.testing.assert_close(lowered, (eps * slope)[:, None].expand(3, 8), rtol=1e-4, atol=1e-4)


@every_attack
def test_4_robustness_never_rises_with_eps(name: str, norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    robust = ATTACKS[name][0](network, images, labels, EPS[norm], ids, norm).robust
    assert (robust[:-1] >= robust[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("more", [{"steps": 18}, {"restarts": 3}, {"loss": "ce+dlr"}], ids=lambda m: next(iter(m)))
def test_4_robustness_never_rises_with_effort(more: dict, norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    base = {"steps": 6, "step_size": EPS[norm][1] / 3, "seed": 3}
    little = attacks.pgd(network, images, labels, EPS[norm], ids, norm, **base)
    much = attacks.pgd(network, images, labels, EPS[norm], ids, norm, **(base | more))
    assert (much.robust <= little.robust).all()
    if "steps" in more:  # twelve more steps of this size reach where six do not
        assert much.robust.sum() < little.robust.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_5_pgd_beats_fgsm_beats_noise(norm: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    eps = EPS[norm][3]
    foolbox_noise = {"linf": "LinfAdditiveUniformNoiseAttack", "l2": "L2AdditiveGaussianNoiseAttack"}[norm]
    noise = attacks.Foolbox(attack=foolbox_noise)(network, images, labels, eps).robust_accuracy[0]
    fgsm = attacks.fgsm(network, images, labels, eps, norm).robust_accuracy[0]
    pgd = attacks.pgd(network, images, labels, eps, ids, norm).robust_accuracy[0]
    assert pgd <= fgsm < noise


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "apgd"])
def test_5_an_unbounded_attack_breaks_all(name: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    if name == "fgsm":  # one step of 1 makes a picture of its own; iterated attacks must reach 0
        assert ATTACKS[name][0](network, images, labels, 1.0, ids, "linf").robust_accuracy[0] < 0.1
    else:
        assert ATTACKS[name][0](network, images, labels, 1.0, ids, "linf").robust_accuracy[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "square"])
def test_6_a_verdict_does_not_depend_on_its_batch(name: str, norm: str, network: nn.Module, digits: Digits) -> None:
    if (name, norm) not in CASES:
        pytest.skip("square is an L-infinity attack")
    attack, eps = ATTACKS[name][0], EPS[norm][1:4:2]
    images, labels, ids = (part[:64] for part in digits)
    whole = attack(network, images, labels, eps, ids, norm, batch_size=64)
    for batch_size in (1, 7):
        same_but_for_ties(whole, attack(network, images, labels, eps, ids, norm, batch_size=batch_size))
    rows = torch.tensor([40, 3, 17, 8, 63])
    alone = attack(network, images[rows], labels[rows], eps, ids[rows], norm)
    same_but_for_ties(whole, alone, rows)


class Breaks(nn.Module):
    """Fails at its third call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of order")
        return self.network(pixels)


@pytest.mark.parametrize("fails", [False, True])
@every_attack
def test_7_the_network_is_as_before(
    name: str, norm: str, fails: bool, networks: dict[str, nn.Module], digits: Digits
) -> None:
    images, labels, ids = digits
    network = networks["convnet"]
    victim = Breaks(network) if fails else network
    network.train()
    network.layers[1].eval()  # a mixed mode, to be found again
    first = next(network.parameters())
    first.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    generator = torch.get_rng_state()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of order"):
                ATTACKS[name][0](victim, images, labels, EPS[norm], ids, norm)
        else:
            ATTACKS[name][0](victim, images, labels, EPS[norm], ids, norm)
        assert [module.training for module in network.modules()] == modes
        assert [p.requires_grad for p in network.parameters()] == flags
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)
    finally:
        network.eval()
        first.requires_grad_(True)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_8_targets_are_reached(norm: str, loss: str, network: nn.Module, digits: Digits) -> None:
    images, labels, ids = digits
    targets = (labels + 3) % 10
    eps = {"linf": 0.6, "l2": 10.0}[norm]
    result = attacks.pgd(network, images, labels, eps, ids, norm, 40, loss=loss, targeted=targets)
    assert result.robust_accuracy[0] <= 0.05
    with torch.no_grad():
        reached = network(result.adversarial(0)).argmax(1) == targets
    assert torch.equal(reached, ~result.robust[0])


def test_8_random_labels_and_an_untrained_network(digits: Digits) -> None:
    images, labels, ids = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Normalised(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    result = attacks.pgd(network, images, labels[torch.arange(len(labels)) - 7], EPS["linf"], ids)
    assert result.clean.double().mean() < 0.3
    assert torch.equal(result.robust[0], result.clean)
    assert (result.robust <= result.clean).all()


@pytest.mark.slow
def test_confidence_does_not_hide_the_gradient(networks: dict[str, nn.Module], digits: Digits) -> None:
    """Logits times 1000 leave every decision as it is; cross-entropy's own gradient would be zero almost everywhere."""
    images, labels, ids = digits
    network = networks["convnet"]
    sure = nn.Sequential(network, Scale(1000.0))
    plain = attacks.pgd(network, images, labels, EPS["linf"], ids)
    scaled = attacks.pgd(sure, images, labels, EPS["linf"], ids)
    foolbox = attacks.pgd(sure, images, labels, EPS["linf"], ids, backend="reference")
    assert scaled.robust.double().mean() <= plain.robust.double().mean() + 0.005
    assert foolbox.robust.double().mean() > plain.robust.double().mean() + 0.05


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits
