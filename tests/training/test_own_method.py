"""A method in one file outside the package: trained by its name, with and without the CO term, resumed and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import coss_eval as ce
from coss_eval.cli.app import app
from coss_eval.errors import UsageError
from coss_eval.training.config import Config, resolve
from coss_eval.training.methods import method_class
from coss_eval.views.augmentation import ViewRecipe, byol_pair

OWN = '''
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from coss_eval.training.method import Comparison, Heads, Method
from coss_eval.views.augmentation import ViewRecipe


class SquaredDistance(Comparison):
    def forward(self, online, target, index):
        return (online - target[index]).square().mean()


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """The other view's projection by a linear map."""

    views: ClassVar[ViewRecipe] = ViewRecipe(({"blur": 0.5},) * 2)
    out: int = 16

    def heads(self, dim):
        return Heads(nn.Linear(dim, self.out), nn.Linear(self.out, self.out))

    def comparison(self):
        return SquaredDistance()


number = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_regression.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "own_regression:Regression"


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "co-"])
def test_a_method_of_ones_own_trains_from_the_command_line(own: str, prefix: str) -> None:
    flags = ["--preset", "digits-tiny", "--epochs", "1", "--width", "8", "--set", "out=8"]
    assert app(["train", "--method", prefix + own, *flags], result_action="return_value") == 0
    folder = Path("runs") / f"{prefix}own_regression-Regression"
    model = ce.load_model(folder / "model.safetensors")
    assert model.layout == "coss-eval"

    start = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["config"]
    config = Config.from_dict(start)
    assert config.method == prefix + own
    assert (config.options, config.lr, config.crop_min_scale) == ({"out": 8}, 0.2, 0.4)  # the preset's neutral ones
    assert (config.local is None) == (not prefix)

    data, given = ce.load_dataset("digits"), {"preset": "digits-tiny", "epochs": 1, "width": 8, "out": folder}
    again = ce.train(prefix + own, data, resume=True, options={"out": 8}, **given)  # type: ignore[arg-type]
    assert again.sha256 == model.sha256


def test_a_method_brings_its_own_views(own: str) -> None:
    assert method_class(own).views.at(32).full[0].blur == 0.5
    assert method_class(own).name == "Regression"
    assert ViewRecipe(method_class("byol").views.full).at(64) == byol_pair(64)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_regression:Regresion", "did you mean Regression"),
        ("own_regression:number", "derived from coss_eval.training.method.Method, not 3"),
        ("own_regresion:Regression", "cannot import own_regresion"),
    ],
)
def test_what_is_no_method_is_refused(own: str, name: str, said: str) -> None:
    for prefix in ("", "co-"):
        with pytest.raises(UsageError, match=said):
            resolve(prefix + name)
