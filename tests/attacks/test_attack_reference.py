"""The native engine against foolbox, and foolbox's own attacks by name."""

from __future__ import annotations

import foolbox
import numpy as np
import pytest
import torch
from attacked import Digits
from torch import nn

from coss_eval import attacks
from coss_eval.attacks import reference
from coss_eval.errors import UsageError

EPS = {"linf": [0.01, 0.03, 0.06, 0.12], "l2": [0.1, 0.3, 0.6, 1.2]}
PGD = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}
FGSM = {"linf": foolbox.attacks.FGSM, "l2": foolbox.attacks.FGM}


def bare_foolbox(attack: foolbox.Attack, network: nn.Module, digits: Digits, eps: list[float]) -> list[float]:
    """foolbox as its users run it, on its own: robust accuracy at each eps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        victim = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        _, _, success = attack(victim, digits.images, digits.labels, epsilons=eps)
    network.zero_grad(set_to_none=True)  # it leaves gradients in the parameters
    return (~success).double().mean(1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rel_step", [2.5 / 20, 0.01 / 0.3])
def test_pgd_is_at_least_as_strong_at_equal_step(
    norm: str, rel_step: float, network: nn.Module, digits: Digits
) -> None:
    """From the clean image, so that luck has no part in it."""
    peer = PGD[norm](rel_stepsize=rel_step, steps=20, random_start=False)
    theirs = bare_foolbox(peer, network, digits, EPS[norm])
    for eps, robust in zip(EPS[norm], theirs, strict=True):
        ours = attacks.pgd(network, *digits[:2], eps, digits.ids, norm, rel_step=rel_step, random_start=False)
        assert ours.robust_accuracy[0] <= robust + 0.005


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rel_step", [2.5 / 20, 0.01 / 0.3])
def test_pgd_with_random_starts(norm: str, rel_step: float, network: nn.Module, all_digits: Digits) -> None:
    """Each tool draws its own starts: on all digits luck counts for less than half a point, or two at short steps."""
    theirs = bare_foolbox(PGD[norm](rel_stepsize=rel_step, steps=20), network, all_digits, EPS[norm])
    luck = 0.005 if rel_step > 0.1 else 0.02
    for eps, robust in zip(EPS[norm], theirs, strict=True):
        ours = attacks.pgd(network, *all_digits[:2], eps, all_digits.ids, norm, rel_step=rel_step)
        assert ours.robust_accuracy[0] <= robust + luck


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_as_strong(norm: str, network: nn.Module, digits: Digits) -> None:
    theirs = bare_foolbox(FGSM[norm](), network, digits, EPS[norm])
    for eps, robust in zip(EPS[norm], theirs, strict=True):
        ours = attacks.fgsm(network, *digits[:2], eps, norm).robust_accuracy[0]
        assert ours <= robust + 0.005
        assert ours >= robust - 0.02  # one step from the same point: the same attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_backends_start_at_the_same_points(norm: str, network: nn.Module, digits: Digits) -> None:
    """With foolbox's last iterate against our best so far, the reference can only leave more."""
    native = attacks.pgd(network, *digits[:2], EPS[norm], digits.ids, norm, seed=2)
    foolbox = attacks.pgd(network, *digits[:2], EPS[norm], digits.ids, norm, seed=2, backend="reference")
    assert torch.equal(native.clean, foolbox.clean)
    assert (native.robust & ~foolbox.robust).double().mean() <= 0.005
    assert (native.robust != foolbox.robust).double().mean() <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_reference_starts_do_not_depend_on_the_batch(
    batch_size: int, networks: dict[str, nn.Module], digits: Digits
) -> None:
    part = Digits(*(p[:40] for p in digits))
    args = (networks["perceptron"], *part[:2], EPS["linf"], part.ids)
    whole = attacks.pgd(*args, backend="reference")
    pieces = attacks.pgd(*args, backend="reference", batch_size=batch_size)
    assert torch.equal(whole.robust, pieces.robust)


def test_targets(networks: dict[str, nn.Module], digits: Digits) -> None:
    targets = (digits.labels + 1) % 10
    for backend in ("native", "reference"):
        result = attacks.pgd(
            networks["convnet"], *digits[:2], 0.5, digits.ids, targeted=targets, steps=40, backend=backend
        )
        assert result.robust_accuracy[0] <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm", "options"),
    [
        ("LinfDeepFoolAttack", "linf", {}),
        ("L2DeepFoolAttack", "l2", {}),
        ("LInfFMNAttack", "linf", {"steps": 20}),
        ("LinfAdditiveUniformNoiseAttack", "linf", {}),
        ("DDNAttack", "l2", {"steps": 20}),
        ("SaltAndPepperNoiseAttack", "l2", {"steps": 5}),
    ],
)
def test_any_foolbox_attack_by_name(
    name: str, norm: str, options: dict, networks: dict[str, nn.Module], digits: Digits
) -> None:
    network, (images, labels, _) = networks["convnet"], Digits(*(p[:50] for p in digits))
    next(network.parameters()).requires_grad_(True)
    trained = [p.requires_grad for p in network.parameters()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = attacks.Foolbox(attack=name, extra=options)(network, images, labels, EPS[norm])
    again = attacks.Foolbox(attack=name, extra=options)(network, images, labels, EPS[norm])
    assert result.norm == norm
    assert (result.robust[:-1] >= result.robust[1:]).all()
    assert torch.equal(result.robust, again.robust)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == trained
    perturbation = (result.adversarial(-1) - images).flatten(1)
    size = perturbation.abs().amax(1) if norm == "linf" else perturbation.norm(dim=1)
    assert (size <= EPS[norm][-1] + 1e-5).all()


def test_names_of_foolbox() -> None:
    assert {"LinfDeepFoolAttack", "L2CarliniWagnerAttack", "GenAttack"} <= set(reference.names())
    assert "Attack" not in reference.names()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "LinfDeepFolAttack",
            {},
            "unknown foolbox attack 'LinfDeepFolAttack'; did you mean LinfDeepFoolAttack",
        ),
        ("LinfDeepFoolAttack", {"stepz": 3}, "does not take these options"),
        ("SpatialAttack", {}, "has no distance of its own"),
        ("BinarizationRefinementAttack", {}, "has no distance of its own"),
    ],
)
def test_foolbox_errors(name: str, options: dict, match: str, networks: dict[str, nn.Module], digits: Digits) -> None:
    with pytest.raises(UsageError, match=match):
        attacks.Foolbox(attack=name, extra=options)(networks["linear"], digits.images, digits.labels, 0.1)
