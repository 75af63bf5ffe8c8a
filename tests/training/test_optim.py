"""LARS against its formula parameter by parameter, the groups, and the schedules."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from training_parts import SMALL, TINY, TWO_CONVOLUTIONS, digits

from coss_eval.errors import UsageError
from coss_eval.training.config import resolve
from coss_eval.training.optim import LARS, cosine, ema_update, make_optimizer, parameter_groups, set_lr, warm_up_cosine
from coss_eval.training.setup import Setup


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def backward(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module.zero_grad()
    module(torch.randn(6, 3, 8, 8, generator=generator)).square().mean().backward()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("trust", [0.001, 0.5])
def test_lars_is_its_formula_written_out(clip: bool, trust: float) -> None:
    fast, slow = network(), network()
    for module in (fast, slow):
        nn.init.zeros_(module[3].weight)  # a norm of zero at the first step
    optimizer = LARS(parameter_groups(fast, 0.01), lr=3.0, momentum=0.9, trust=trust, clip=clip)
    velocity = {name: torch.zeros_like(p) for name, p in slow.named_parameters()}
    for seed in range(4):
        backward(fast, seed)
        optimizer.step()
        backward(slow, seed)
        with torch.no_grad():
            for name, p in slow.named_parameters():
                assert p.grad is not None
                step = p.grad.clone()
                if p.ndim > 1:
                    step += 0.01 * p
                    if p.norm() > 0 and step.norm() > 0:
                        ratio = float(trust * p.norm() / step.norm())
                        step *= min(ratio / 3.0, 1.0) if clip else ratio
                velocity[name] = 0.9 * velocity[name] + step
                p -= 3.0 * velocity[name]
    for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_lars_leaves_what_has_no_gradient_and_moves_what_is_zero() -> None:
    module = network()
    nn.init.zeros_(module[3].weight)
    backward(module, 0)
    module[0].weight.grad = None
    kept = module[0].weight.detach().clone()
    optimizer = LARS(parameter_groups(module, 0.0), lr=0.1)
    optimizer.step()
    assert torch.equal(module[0].weight, kept)
    assert all(p.isfinite().all() for p in module.parameters())
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_groups_spare_vectors_and_frozen_parameters() -> None:
    module = network()
    module[0].requires_grad_(False)
    groups = parameter_groups(module, 0.01, constant=[module[3]], vector_scale=0.1)
    optimizer = make_optimizer("sgd", groups, lr=1.0)
    set_lr(optimizer, 0.5, 2.0)
    rows = {(g["constant"], g["adapt"]): (g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups}
    assert rows == {(False, False): (0.05, 0.0, 2), (True, True): (2.0, 0.01, 1), (True, False): (0.2, 0.0, 1)}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_every_optimiser_lowers_a_loss_and_comes_back_from_its_state(name: str) -> None:
    module = network()
    optimizer = make_optimizer(name, parameter_groups(module, 1e-4), lr=0.02)
    for seed in range(3):
        backward(module, seed)
        optimizer.step()
    twin = copy.deepcopy(module)
    other = make_optimizer(name, parameter_groups(twin, 1e-4), lr=0.02)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, stepper in ((module, optimizer), (twin, other)):
        backward(each, 9)
        stepper.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
    with pytest.raises(UsageError, match="did you mean"):
        make_optimizer(name + "x", parameter_groups(module, 0.0), lr=0.1)


def test_schedules() -> None:
    lrs = [warm_up_cosine(2.0, step, warm_up=10, total=100) for step in range(100)]
    assert lrs[0] == pytest.approx(0.2)
    assert max(lrs) == pytest.approx(2.0)
    assert lrs[9] == pytest.approx(2.0)
    assert all(a >= b for a, b in pairwise(lrs[9:]))
    assert 0 < lrs[-1] < 0.01
    taus = [cosine(0.99, 1.0, step / 50) for step in range(51)]
    assert (taus[0], taus[-1]) == (pytest.approx(0.99), 1.0)
    assert taus[25] == pytest.approx(1 - 0.01 * (math.cos(math.pi / 2) + 1) / 2)


def test_the_moving_average_is_in_place() -> None:
    target, online = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.zeros(2, 2)]
    places = [t.data_ptr() for t in target]
    ema_update(target, online, 0.75)
    assert [t.data_ptr() for t in target] == places
    torch.testing.assert_close(target, [torch.full((3,), 0.25), torch.full((2, 2), 0.75)])


@pytest.mark.parametrize(("method", "small_views"), [("co-simsiam", 2), ("co-simsiam", 0), ("byol", 2)])
def test_simsiams_predictors_all_keep_their_rate(method: str, small_views: int) -> None:
    options = SMALL[method.removeprefix("co-")]
    fields = {**TINY, **TWO_CONVOLUTIONS, "small_views": small_views, "small_size": 16, "options": options}
    task = Setup(resolve(method, **fields), digits(64), torch.device("cpu"))
    names = {id(p): name for name, p in task.objective.named_parameters()}
    constant = {names[id(p)] for g in task.optimizer().param_groups if g["constant"] for p in g["params"]}
    expected = {name for name in names.values() if "predictor." in name} if method == "co-simsiam" else set()
    assert constant == expected
    assert any("small_predictor" in name for name in names.values()) == (small_views > 0)
