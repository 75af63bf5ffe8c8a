"""Every registered corruption declares what lists, tables and engine need; and one of a person's own is its equal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coss_eval.corruptions import corrupt, corruption, register
from coss_eval.corruptions.names import find
from coss_eval.corruptions.registry import CORRUPTIONS
from coss_eval.corruptions.severity import Setting
from coss_eval.errors import UsageError
from coss_eval.tasks.corruptions.task import Corruptions

OWN = '''
from coss_eval.corruptions import corruption

def darker(images, condition, draws):
    """By more at each severity, and by an amount of each image's own."""
    return images * (1 - 0.1 * condition.severity - 0.05 * draws.uniform(1, 1, 1))

@corruption("dim", severities=(0.9, 0.8, 0.7, 0.6, 0.5))
def dimmed(images, condition, draws):
    return images.float().mul_(condition.parameters[0])
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of one's own; what it registers is forgotten afterwards."""
    (tmp_path / "own_corruptions.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(CORRUPTIONS)
    yield "own_corruptions"
    CORRUPTIONS.clear()
    CORRUPTIONS.update(before)
    sys.modules.pop("own_corruptions", None)


def test_ones_own_works_by_function_module_and_name(images: Callable[..., Tensor], module: str) -> None:
    batch, ids = images(5, 40, 33), torch.arange(5)
    whole = corrupt(batch, f"{module}:darker", 3, ids, seed=2)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, corrupt(batch, sys.modules[module].darker, 3, ids, seed=2))
    assert torch.equal(whole[1:3], corrupt(batch[1:3], f"{module}:darker", 3, ids[1:3], seed=2))
    assert not torch.equal(whole, corrupt(batch, f"{module}:darker", 3, ids, seed=3))
    assert torch.equal(corrupt(batch, "dim", 5, ids), (batch * 0.5).to(torch.uint8))
    assert torch.equal(corrupt(batch, f"{module}:dimmed", 5, ids), corrupt(batch, "dim", 5, ids))
    assert find(f"{module}:dimmed") is find("dim")


def test_ones_own_may_write_into_its_images(images: Callable[..., Tensor], module: str) -> None:
    def inverted(images: Tensor, condition: Setting, draws: Any) -> Tensor:
        return images.mul_(255).sub_(0)

    batch = images(2, 32, 32)
    before = batch.clone()
    assert not torch.equal(corrupt(batch, inverted, 1, torch.arange(2)), before)
    assert torch.equal(batch, before)


def test_the_code_of_ones_own_is_in_its_key_and_of_the_packages_is_not(module: str, tmp_path: Path) -> None:
    first = Corruptions(("fog", f"{module}:darker", "own_corruptions:dimmed")).corruptions
    assert list(first) == ["fog", "darker", "dim"]
    assert first["fog"].code is None
    sys.modules.pop(module)
    (tmp_path / "own_corruptions.py").write_text(OWN.replace("0.05", "0.06"))
    again = Corruptions((f"{module}:darker",)).corruptions["darker"].code
    assert first["darker"].code is not None
    assert again not in (None, first["darker"].code)


def _with_a_version(version: int | None, factor: float) -> Callable[..., Tensor]:
    def scaled(images: Tensor, condition: Setting, draws: Any) -> Tensor:
        return images * factor

    if version is not None:
        scaled.version = version  # type: ignore[attr-defined]
    return scaled


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("fogg"), "did you mean fog"),
        (lambda: find("no_such_module:rain"), "cannot import no_such_module"),
        (lambda: find("own_corruptions:darkr"), "did you mean darker"),
        (lambda: find(lambda images, condition, draws: images), "a name of its own"),
        (
            lambda: find(_with_a_version(None, 0.5)),
            "depends on factor, outside its source; give it one: scaled.version",
        ),
        (lambda: register("fog", _with_a_version(1, 0.5)), "the package has a corruption fog already"),
        (lambda: register("clean", _with_a_version(1, 0.5)), "is not clean"),
        (lambda: register("a/b", _with_a_version(1, 0.5)), "got 'a/b'"),
        (lambda: corruption("b", set="benchmark")(_with_a_version(1, 0.5)), "yours are extra"),
        (lambda: register("b", _with_a_version(1, 0.5), severities=(1, 2)), "parameters for 5 severities"),
        (lambda: Corruptions(("fog", "fog")), "each corruption once, got fog, fog"),
        (lambda: Corruptions((_with_a_version(1, 0.5),), backend="reference"), "the reference backend has no scaled"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], message: str, module: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_version_stands_for_what_the_source_does_not_show() -> None:
    one, two = (find(_with_a_version(version, factor)).code for version, factor in ((1, 0.5), (2, 0.6)))
    assert None not in (one, two)
    assert one != two


def test_an_own_corruption_must_keep_the_shape(images: Callable[..., Tensor]) -> None:
    def cropped(images: Tensor, condition: Setting, draws: Any) -> Tensor:
        return images[..., 1:]

    with pytest.raises(UsageError, match="the corruption cropped made"):
        corrupt(images(1, 32, 32), cropped, 1, torch.arange(1))
