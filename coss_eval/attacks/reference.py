"""Attacks by foolbox (Rauber et al. 2017): the peer that the native engine is measured against, and a stock of others.

foolbox keeps the last iterate of a run; over eps and restarts an image once broken stays broken here, but for attacks
of one step, which are run at each eps alone. Gradients that foolbox leaves in the parameters are removed again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coss_eval.attacks.gradient import FGSM, PGD
from coss_eval.attacks.inputs import Problem, check_eps, held_still
from coss_eval.attacks.losses import verdict
from coss_eval.attacks.norms import NORMS
from coss_eval.attacks.of_foolbox import PREFIX
from coss_eval.attacks.result import AttackResult
from coss_eval.attacks.seeds import condition, image_keys
from coss_eval.errors import UsageError, unknown_name
from coss_eval.runtime.imports import needing

with needing("foolbox"):
    import eagerpy
    import foolbox
    from foolbox.criteria import Misclassification, TargetedMisclassification


def pgd(attack: PGD, problem: Problem, eps: tuple[float, ...], seed: int) -> AttackResult:
    """foolbox's projected gradient descent (its L-infinity and L2 classes) with our step size and per-image starts."""
    options = {
        "rel_stepsize": attack.relative,
        "abs_stepsize": attack.step_size,
        "steps": attack.steps,
        "random_start": attack.random_start,
    }

    def made(level: int, restart: int, rows: Tensor) -> foolbox.Attack:
        place = condition(seed, attack.norm, eps[level], restart)
        return _SEEDED[attack.norm](image_keys(problem.ids[rows], place).to(problem.device), **options)

    return _attack_rising("pgd", attack.norm, problem, eps, made, attack.restarts, seed)


def fgsm(attack: FGSM, problem: Problem, eps: tuple[float, ...]) -> AttackResult:
    """foolbox's fast gradient attack: one step of length eps, no random start."""
    method = {"linf": foolbox.attacks.LinfFastGradientAttack, "l2": foolbox.attacks.L2FastGradientAttack}[attack.norm]
    return _attack_rising("fgsm", attack.norm, problem, eps, lambda *_: method(random_start=False), 1, 0, swept=False)


def names() -> list[str]:
    """The foolbox attacks that can be asked for by name."""
    found = inspect.getmembers(foolbox.attacks, inspect.isclass)
    return sorted(name for name, kind in found if issubclass(kind, foolbox.Attack) and not inspect.isabstract(kind))


def named(
    name: str, options: Mapping[str, Any], problem: Problem, eps: float | Sequence[float], seed: int
) -> AttackResult:
    """Any foolbox attack, such as "LinfDeepFoolAttack", over rising eps; options go to its constructor.

    Many of these attacks draw from the global generators of torch and NumPy: they are seeded for the call and put back
    afterwards, so a result repeats but, unlike the native attacks', depends on batch size and order. Raises UsageError
    for an unknown name or options it does not take.
    """
    attack, norm = _named(name, options)
    swept = not _is_single_step(attack)
    return _attack_rising(PREFIX + name, norm, problem, check_eps(eps, norm), lambda *_: attack, 1, seed, swept=swept)


def is_single_step(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a foolbox attack takes one step of its eps, as FGSM does. Errors as ``named``."""
    return _is_single_step(_named(name, options)[0])


def _is_single_step(attack: foolbox.Attack) -> bool:
    return getattr(attack, "steps", None) == 1


def norm_of(name: str, options: Mapping[str, Any]) -> str:
    """The distance that a foolbox attack measures eps in: "linf", "l2", "l1" or "l0". Errors as ``named``."""
    return _named(name, options)[1]


def _named(name: str, options: Mapping[str, Any]) -> tuple[foolbox.Attack, str]:
    """The attack of that name and its norm."""
    if name not in names():
        raise unknown_name("foolbox attack", name, names())
    try:
        attack = getattr(foolbox.attacks, name)(**options)
    except TypeError as error:
        raise UsageError(f"foolbox's {name} does not take these options: {error}") from error
    try:
        return attack, _norm_of(attack)
    except (AttributeError, ValueError):
        raise UsageError(f"foolbox's {name} has no distance of its own, so eps means nothing to it") from None


def _attack_rising(
    name: str,
    norm: str,
    problem: Problem,
    eps: tuple[float, ...],
    attack: Callable[[int, int, Tensor], foolbox.Attack],
    restarts: int,
    seed: int,
    *,
    swept: bool = True,
) -> AttackResult:
    """Run ``attack(level, restart, rows)`` on what still stands, level by level; keep what broke each image.

    Not ``swept``: on all that is right without an attack, at every level.
    """
    found = problem.images.clone()
    robust = torch.zeros(len(eps), len(found), dtype=torch.bool, device=found.device)
    with held_still(problem.classifier), _untouched(problem.classifier, seed):
        network = foolbox.PyTorchModel(problem.classifier, bounds=(0, 1), device=problem.device)
        clean = ~verdict(problem.clean_logits(), problem.labels, problem.targeted)[1]
        standing = clean.clone()

        def run(level: int, restart: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            pixels, criterion = problem.images[rows].to(problem.device), _criterion(problem, rows)
            result = attack(level, restart, rows)(network, pixels, criterion, epsilons=eps[level])
            pixels, broken = result[1].detach(), result[2]
            return pixels.to(found.device), broken.to(found.device)

        for level in range(len(eps)):
            standing = standing if swept else clean.clone()
            for restart in range(restarts):
                for rows in _batches(standing, problem.batch_size):
                    pixels, broken = run(level, restart, rows)
                    found[rows] = pixels
                    standing[rows[broken]] = False
            robust[level] = standing

    def adversarial(level: int) -> Tensor:
        images = found.clone() if swept else problem.images.clone()
        later = robust[level] & (level < len(eps) - 1) if swept else clean  # these were attacked further
        with held_still(problem.classifier), _untouched(problem.classifier, seed):
            for rows in _batches(later, problem.batch_size):
                images[rows] = run(level, restarts - 1, rows)[0]
        return images

    return AttackResult(name, norm, eps, clean, robust, swept=swept, adversarial_images=adversarial)


def _criterion(problem: Problem, rows: Tensor) -> Misclassification | TargetedMisclassification:
    if problem.targeted is None:
        return Misclassification(problem.labels[rows].to(problem.device))
    return TargetedMisclassification(problem.targeted[rows].to(problem.device))


def _batches(mask: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The rows where ``mask`` holds, in batches; never an empty one."""
    rows = mask.nonzero().flatten()
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _norm_of(attack: foolbox.Attack) -> str:
    power = float(attack.distance.p)
    return "linf" if math.isinf(power) else f"l{power:g}"


@contextmanager
def _untouched(classifier: nn.Module, seed: int) -> Iterator[None]:
    """foolbox calls backward() and draws from global generators: parameters stand still, generators are put back.

    Frozen parameters get no gradient, which saves the time; and oneDNN's weight gradients in the channels-last layout
    corrupt memory where channels are no multiple of 16 (torch 2.15).
    """
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    numpy_state = np.random.get_state()  # noqa: NPY002 (the state that foolbox draws from)
    for parameter in trained:
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            for parameter in trained:
                parameter.requires_grad_(True)


class _SeededStart:
    """Mixed into foolbox's attacks: each image's random start comes from its own key."""

    norm: str

    def __init__(self, keys: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self._keys = keys

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        size = torch.full((len(x0), 1, 1, 1), epsilon, device=x0.raw.device)
        return eagerpy.astensor(NORMS[self.norm].start(x0.raw, size, self._keys))


class _SeededLinf(_SeededStart, foolbox.attacks.LinfProjectedGradientDescentAttack):  # type: ignore[misc]
    norm = "linf"


class _SeededL2(_SeededStart, foolbox.attacks.L2ProjectedGradientDescentAttack):  # type: ignore[misc]
    norm = "l2"


_SEEDED = {"linf": _SeededLinf, "l2": _SeededL2}
