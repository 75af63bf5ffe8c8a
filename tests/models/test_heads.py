"""When a checkpoint's own head is used, and through which map."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coss_eval.checkpoints.load import make_model
from coss_eval.errors import UsageError
from coss_eval.models.choices import HeadChoice
from coss_eval.models.heads import resolve_head
from coss_eval.models.model import Model

NAMES = ("n01", "n02", "n03", "n04")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model("resnet18", width=16, classes=NAMES)


@pytest.mark.parametrize(
    ("classes", "choice", "use_own", "class_map"),
    [
        (NAMES, "auto", True, None),
        (NAMES[::-1], "auto", True, (3, 2, 1, 0)),
        (("n04", "n02"), "auto", True, (3, 1)),
        ((*NAMES, "n05"), "auto", False, None),
        (("cat", "dog", "cow", "owl"), "auto", False, None),
        (NAMES, "own", True, None),
        (("0", "1", "2", "3"), "own", True, None),  # a numbering names no class: the caller asserts it
        (("0", "10", "2", "3"), "own", True, (0, 3, 1, 2)),
        (NAMES, "probe", False, None),
        (NAMES, None, True, None),
    ],
)
def test_names_decide(
    model: Model,
    classes: tuple[str, ...],
    choice: HeadChoice | None,
    use_own: bool,
    class_map: tuple[int, ...] | None,
) -> None:
    decision = resolve_head(model, classes, choice)
    assert (decision.use_own, decision.class_map) == (use_own, class_map)
    assert decision.why.startswith("own head" if use_own else "a probe")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (NAMES[:3], "has 4 outputs, the dataset 3 classes"),
        (NAMES[::-1], "in another order; --head auto maps them"),
        ((*NAMES[:3], "n05"), "has other classes"),
        (("cat", "dog", "cow", "owl"), "output 0 is 'n01', the dataset's class 0 'cat'"),
    ],
)
def test_own_asserts_sizes_and_order(model: Model, classes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_head(model, classes, "own")


def test_without_names_or_without_a_head(model: Model) -> None:
    unnamed, headless = replace(model, classes=None), replace(model, head=None, classes=None)
    assert not resolve_head(unnamed, NAMES, "auto").use_own
    assert resolve_head(unnamed, NAMES, "own").use_own
    assert not resolve_head(headless, NAMES, "auto").use_own
    with pytest.raises(UsageError, match="has no classifier head"):
        resolve_head(headless, NAMES, "own")
    with pytest.raises(UsageError, match="auto, own or probe"):
        resolve_head(model, NAMES, "mine")  # type: ignore[arg-type]


def test_the_models_own_choice_is_the_default(model: Model) -> None:
    assert not resolve_head(replace(model, head_choice="probe"), NAMES).use_own
