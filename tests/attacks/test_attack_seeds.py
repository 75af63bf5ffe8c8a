"""Random starts belong to an image: to its id and condition, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from coss_eval.attacks.norms import NORMS
from coss_eval.attacks.seeds import condition, image_keys

IDS = torch.tensor([3, 2**62, -5, 0, 1, 123456789012345])


@pytest.mark.parametrize("norm", list(NORMS))
def test_rows_do_not_depend_on_their_batch(norm: str) -> None:
    keys = image_keys(IDS, condition(0, norm, 0.1, 0))
    clean, eps = torch.full((6, 3, 5, 4), 0.5), torch.full((6, 1, 1, 1), 0.1)
    start = NORMS[norm].start
    whole = start(clean, eps, keys)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(start(clean[order], eps[order], keys[order]), whole[order])
    assert torch.equal(torch.cat([start(clean[:1], eps[:1], key[None]) for key in keys]), whole)


def test_every_part_of_a_condition_matters() -> None:
    conditions = [condition(*parts) for parts in ((0, "linf", 0.1, 0), (1, "linf", 0.1, 0), (0, "l2", 0.1, 0))]
    conditions += [condition(0, "linf", 0.2, 0), condition(0, "linf", 0.1, 1)]
    keys = torch.cat([image_keys(IDS, c) for c in conditions])
    assert len(keys.unique()) == len(keys)


def test_conditions_are_the_same_in_every_process() -> None:
    assert condition(0, "linf", 0.1, 0) == 987586663481647068


@pytest.mark.parametrize("norm", list(NORMS))
def test_starts_are_uniform_in_the_ball(norm: str) -> None:
    keys = image_keys(torch.arange(4000), 1)
    clean = torch.full((4000, 1, 1, 3), 0.5)
    moved = (NORMS[norm].start(clean, torch.full((4000, 1, 1, 1), 0.4), keys) - clean).flatten(1) / 0.4
    if norm == "linf":
        assert stats.kstest(moved.flatten(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    else:
        assert stats.kstest(moved.norm(dim=1) ** 3, "uniform").pvalue > 1e-3  # volume grows as r^3
        assert moved.mean(0).abs().max() < 0.03
