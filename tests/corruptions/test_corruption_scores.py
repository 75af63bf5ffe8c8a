"""mCE: AlexNet's, its refusals, and the equality of one-number and per-image forms."""

from __future__ import annotations

import numpy as np
import pytest

from coss_eval.corruptions import score
from coss_eval.corruptions.names import NAMES
from coss_eval.errors import UsageError

IMAGENET = {"dataset": "imagenet", "side": 224, "table": "imagenet"}
CONDITIONS = [(name, severity) for name in NAMES for severity in range(1, 6)]


def test_alexnet_has_an_mce_of_one() -> None:
    errors = {(name, severity): score.ALEXNET[name] for name, severity in CONDITIONS}
    assert score.mce(errors, **IMAGENET) == pytest.approx(1)
    assert score.relative_mce(errors, score.ALEXNET_CLEAN, **IMAGENET) == pytest.approx(1)


def test_per_image_errors_give_each_image_its_share() -> None:
    rng = np.random.default_rng(0)
    wrong = {condition: (rng.random(400) < 0.4).astype(float) for condition in CONDITIONS}
    clean = (rng.random(400) < 0.1).astype(float)
    errors = {condition: float(values.mean()) for condition, values in wrong.items()}
    for shares, value in [
        (score.mce(wrong, **IMAGENET), score.mce(errors, **IMAGENET)),
        (score.relative_mce(wrong, clean, **IMAGENET), score.relative_mce(errors, float(clean.mean()), **IMAGENET)),
    ]:
        assert shares.shape == (400,)
        assert shares.mean() == pytest.approx(value)


def test_a_gap_is_named_and_never_averaged_over() -> None:
    errors = {condition: 0.5 for condition in CONDITIONS if condition not in {("fog", 2), ("snow", 5)}}
    with pytest.raises(UsageError, match="no score over 15 corruptions: missing snow 5, fog 2; run"):
        score.mce(errors, **IMAGENET)
    with pytest.raises(UsageError, match="and 72 more"):
        score.mce({}, **IMAGENET)


@pytest.mark.parametrize("change", [{"dataset": "tiny-imagenet"}, {"side": 64}, {"table": "cifar"}])
def test_mce_only_where_alexnet_applies(change: dict[str, object]) -> None:
    errors = dict.fromkeys(CONDITIONS, 0.5)
    with pytest.raises(UsageError, match="report the mean corruption error instead"):
        score.mce(errors, **{**IMAGENET, **change})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="report the mean corruption error instead"):
        score.relative_mce(errors, 0.2, **{**IMAGENET, **change})  # type: ignore[arg-type]
