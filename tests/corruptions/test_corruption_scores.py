"""Scores: their definitions, their refusals, and the equality of one-number and per-image forms."""

from __future__ import annotations

import numpy as np
import pytest

from coss_eval.corruptions import score
from coss_eval.corruptions.names import BENCHMARK, NAMES, SEEN_LIKE, UNSEEN, VALIDATION
from coss_eval.errors import UsageError

IMAGENET = {"dataset": "imagenet", "side": 224, "table": "imagenet"}
CONDITIONS = [(name, severity) for name in NAMES for severity in range(1, 6)]


def test_alexnet_has_an_mce_of_one() -> None:
    errors = {(name, severity): score.ALEXNET[name] for name, severity in CONDITIONS}
    assert score.mce(errors, **IMAGENET) == pytest.approx(1)
    assert score.relative_mce(errors, score.ALEXNET_CLEAN, **IMAGENET) == pytest.approx(1)


def test_means_follow_their_definition() -> None:
    errors = {condition: index / 100 for index, condition in enumerate(CONDITIONS)}
    assert score.mean_error(errors) == pytest.approx(np.mean([errors[c] for c in CONDITIONS if c[0] in BENCHMARK]))
    assert score.mean_error(errors, VALIDATION) == pytest.approx(np.mean([errors[c] for c in CONDITIONS[75:]]))
    categories = score.by_category(errors)
    assert list(categories) == ["noise", "blur", "weather", "digital"]
    assert categories["noise"] == pytest.approx(np.mean([errors[c] for c in CONDITIONS[:15]]))
    apart = score.seen_and_unseen(errors)
    assert apart["seen-like"] == pytest.approx(np.mean([errors[c] for c in CONDITIONS if c[0] in SEEN_LIKE]))
    assert apart["unseen"] == pytest.approx(np.mean([errors[c] for c in CONDITIONS if c[0] in UNSEEN]))


def test_per_image_errors_give_each_image_its_share_and_an_interval() -> None:
    rng = np.random.default_rng(0)
    wrong = {condition: (rng.random(400) < 0.4).astype(float) for condition in CONDITIONS}
    clean = (rng.random(400) < 0.1).astype(float)
    errors = {condition: float(values.mean()) for condition, values in wrong.items()}
    for shares, value in [
        (score.mean_error(wrong), score.mean_error(errors)),
        (score.mce(wrong, **IMAGENET), score.mce(errors, **IMAGENET)),
        (score.relative_mce(wrong, clean, **IMAGENET), score.relative_mce(errors, float(clean.mean()), **IMAGENET)),
    ]:
        assert shares.shape == (400,)
        assert shares.mean() == pytest.approx(value)
        low, high = score.interval(shares)
        assert low < value < high
    with pytest.raises(UsageError, match="at least 2 images, got 1"):
        score.interval(np.zeros(1))


def test_a_gap_is_named_and_never_averaged_over() -> None:
    errors = {condition: 0.5 for condition in CONDITIONS if condition not in {("fog", 2), ("snow", 5)}}
    assert score.missing(errors) == [("snow", 5), ("fog", 2)]
    with pytest.raises(UsageError, match="no score over 15 corruptions: missing snow 5, fog 2; run"):
        score.mean_error(errors)
    with pytest.raises(UsageError, match="missing"):
        score.mce(errors, **IMAGENET)
    assert score.mean_error(errors, VALIDATION) == 0.5
    with pytest.raises(UsageError, match="and 72 more"):
        score.mean_error({})
    with pytest.raises(UsageError, match="at least one corruption"):
        score.mean_error(errors, ())


@pytest.mark.parametrize("change", [{"dataset": "tiny-imagenet"}, {"side": 64}, {"table": "cifar"}])
def test_mce_only_where_alexnet_applies(change: dict[str, object]) -> None:
    errors = dict.fromkeys(CONDITIONS, 0.5)
    with pytest.raises(UsageError, match="report the mean corruption error instead"):
        score.mce(errors, **{**IMAGENET, **change})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="report the mean corruption error instead"):
        score.relative_mce(errors, 0.2, **{**IMAGENET, **change})  # type: ignore[arg-type]
