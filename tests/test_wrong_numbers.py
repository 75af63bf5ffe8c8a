"""Ways to a wrong, stale or misnamed number that were found in use: each has its right value here."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Convolutional
from torch import Tensor, nn

import coss_eval as ce
from coss_eval import evaluation
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossWarning, UsageError
from coss_eval.models.classifier import Classifier, Preprocessing
from coss_eval.models.load import make_model, save_model
from coss_eval.models.model import Model
from coss_eval.probes.behaviour import apart, batch_dependence, observe
from coss_eval.store import Store
from coss_eval.tasks.attacks import Attacks
from coss_eval.tasks.corruptions import Corruptions
from coss_eval.tasks.crops import Crops
from coss_eval.tasks.internal import Internal
from coss_eval.tasks.probe import Probe
from coss_eval.tasks.redundancy import Redundancy

# --- evaluation: identity, finiteness, batches, names, gaps -----------------------------------------------------------

CLEAN = Corruptions(names=())


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = ce.load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(60, 0), test=data.test.limited(40, 0))


def own_head(digits: Dataset, backbone: nn.Module | None = None) -> Model:
    """A small network whose own head has the dataset's classes, its logits told apart by random weights."""
    torch.manual_seed(0)
    if backbone is None:
        return make_model("resnet18", stem="cifar", width=8, classes=digits.classes)
    head, classes = nn.Linear(16, len(digits.classes)), digits.classes
    return Model(
        "hand-made", "hand-made", backbone.eval(), head, classes, Preprocessing(), "", "hand-made"
    ).identified()


def images_and_labels(digits: Dataset) -> tuple[Tensor, Tensor]:
    (batch,) = digits.test.batches(Preprocessing().geometry, batch_size=64)
    return batch.images.float() / 255, batch.labels


@torch.no_grad()
def right_accuracy(model: Model, digits: Dataset, batch_size: int = 64) -> float:
    """By hand: normalise, forward, count."""
    pixels, labels = images_and_labels(digits)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    logits = torch.cat([model.head(model.backbone((part - mean) / std)) for part in pixels.split(batch_size)])
    return (logits.argmax(1) == labels).double().mean().item()


def clean_accuracies(out: Path) -> list[float]:
    return [record["measurements"][0]["value"] for record in Store(out).records()]


def test_weights_changed_in_place_are_another_model(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    before, first = ce.extract(model, digits.test, device="cpu").values["global"], right_accuracy(model, digits)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.data.mul_(torch.rand(parameter.shape) > 0.3)  # pruned; torch counts no version of .data
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    assert sorted(clean_accuracies(tmp_path)) == sorted([first, right_accuracy(model, digits)])
    after = ce.extract(model, digits.test, device="cpu").values["global"]
    assert not torch.allclose(before, after)
    classifier = Classifier(model.backbone, nn.Identity(), model.preprocessing)
    torch.testing.assert_close(after, classifier(images_and_labels(digits)[0]), rtol=1e-3, atol=1e-4)


NETWORK = """
from torch import nn
from torchvision.models import resnet18

def factory():
    network = resnet18(num_classes=10)
    network.relu = nn.{act}()
    return network
"""


def test_edited_code_of_a_factory_is_another_model(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    protocols = []
    for act in ("ReLU", "GELU", "ReLU"):
        (tmp_path / "edited_net.py").write_text(NETWORK.format(act=act))
        sys.modules.pop("edited_net", None)
        importlib.invalidate_caches()
        protocols.append(make_model("edited_net:factory").identified().protocol())
    assert protocols[0] == protocols[2] != protocols[1]
    assert protocols[0]["sha256"] == protocols[1]["sha256"]
    assert "code" not in own_head(digits).identified().protocol()  # ordinary networks keep their keys


TASK = """
from dataclasses import dataclass
from coss_eval.store import Cell, Measurement
from coss_eval.tasks.task import Result, Task

@dataclass(frozen=True)
class Mine(Task):
    name = "mine"
    uses_head = False
    def cells(self, subject, seed):
        return [Cell("mine", {{}})]
    def measure(self, cell, subject):
        return Result([Measurement("mine", {value}, 1)])
"""


def task_of(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(folder)
    (folder / "edited_task.py").write_text(text)
    sys.modules.pop("edited_task", None)
    importlib.invalidate_caches()
    return importlib.import_module("edited_task").Mine


def test_edited_code_of_a_task_is_another_cell(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_head(digits)
    for value in (1.0, 2.125):
        task = task_of(TASK.format(value=value), tmp_path, monkeypatch)()
        ce.evaluate(model, digits, [task], out=tmp_path / "out")
    assert sorted(clean_accuracies(tmp_path / "out")) == [1.0, 2.125]


def test_a_task_without_source_needs_a_version(digits: Dataset, tmp_path: Path) -> None:
    module = types.ModuleType("nowhere")
    sys.modules["nowhere"] = module
    exec(TASK.format(value=1.0), module.__dict__)  # noqa: S102 - code that no file holds, as in a console
    with pytest.raises(UsageError, match="version"):
        evaluation.plan(own_head(digits), digits, tasks=[module.Mine()], out=tmp_path)
    module.Mine.version = 1
    assert evaluation.plan(own_head(digits), digits, tasks=[module.Mine()], out=tmp_path).missing == 1


def twice_as_bright(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (2 * args[0],)


def test_other_outputs_are_never_taken_for_the_stored_ones(digits: Dataset, tmp_path: Path) -> None:
    """Weights, settings and sources are the same, as where code elsewhere was edited."""
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    assert evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path).missing == 0
    with torch.no_grad():  # rounding is no change
        hook = model.backbone.register_forward_pre_hook(lambda _module, args: (args[0] * (1 + 1e-6),))
        assert evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path).missing == 0
        hook.remove()
    hook = model.backbone.register_forward_pre_hook(twice_as_bright)
    with pytest.raises(UsageError, match=r"other outputs.*--out, or --overwrite"):
        evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path, overwrite=True)
    assert clean_accuracies(tmp_path) == [right_accuracy(model, digits)]
    hook.remove()
    with pytest.raises(UsageError, match="other outputs"):  # back to the first: now those are the former ones
        evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path)


def test_a_store_from_before_is_accepted_and_gets_the_outputs(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    (cell,), record = tmp_path.glob("cells/*.json"), json.loads((tmp_path / "run.json").read_text())
    content = json.loads(cell.read_text())
    del content["outputs"], record["runs"][0]["models"][0]["outputs"]
    cell.write_text(json.dumps(content))
    (tmp_path / "run.json").write_text(json.dumps(record))
    ce.evaluate(model, digits, [CLEAN], out=tmp_path)
    assert "outputs" not in json.loads(cell.read_text())  # nothing was computed again
    model.backbone.register_forward_pre_hook(twice_as_bright)
    with pytest.raises(UsageError, match="other outputs"):
        evaluation.plan(model, digits, tasks=[CLEAN], out=tmp_path)


EVERY_TASK = [
    Probe(fractions=()),
    CLEAN,
    Attacks((("fgsm", "linf"),), eps={"linf": (1 / 255,)}, checked_images=0),
    Internal(sites=("prepool",), kinds=("channel",), levels=(0.5,), seeds=1),
    Crops((0.4,), (), (), ()),
    Redundancy(),
]


@pytest.mark.parametrize("where", ["backbone", "head"])
def test_one_nan_weight_is_a_failed_cell_and_no_number(where: str, digits: Dataset, tmp_path: Path) -> None:
    broken, sound = own_head(digits), replace(make_model("resnet18", stem="cifar", width=8, seed=1), name="sound")
    with torch.no_grad():
        next((broken.backbone if where == "backbone" else broken.head).parameters()).view(-1)[0] = float("nan")
    broken = replace(broken, name="broken", head_choice="own")
    run = ce.evaluate([broken, sound], digits, EVERY_TASK, out=tmp_path)
    records = Store(tmp_path).records()
    measured = {record["task"] for record in records if record["model"] == "broken"}
    assert measured == ({"probe", "redundancy"} if where == "head" else {"redundancy"})
    untrained = [r for r in records if r["model"] == "broken" and r["task"] == "redundancy" and where == "backbone"]
    assert all(record["params"]["weights"] == "untrained" for record in untrained)
    assert {record["task"] for record in records if record["model"] == "sound"} == {t.name for t in EVERY_TASK}
    assert all("broken" in line for line in run.failures)
    assert all("NaN or infin" in line for line in run.failures), run.failures


class BatchStatistics(Convolutional):
    """BatchNorm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None


class Drops(Convolutional):
    def features(self, pixels: Tensor) -> Tensor:
        return F.dropout(super().features(pixels), 0.5, training=True)


@pytest.mark.parametrize("network", [BatchStatistics, Drops])
def test_batch_dependent_networks_are_refused(network: type[nn.Module], digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits, network())
    for call in (
        lambda: ce.evaluate(model, digits, [CLEAN], out=tmp_path),
        lambda: ce.extract(model, digits.test, device="cpu"),
        lambda: ce.fit_classifier(model, digits, head="probe", device="cpu"),
    ):
        with pytest.raises(UsageError, match=r"differs? by [\d.e+]+ % .*--allow-batch-dependent"):
            call()


def test_a_batch_dependent_number_is_kept_with_its_batch_size(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits, BatchStatistics())
    for size in (8, 20):
        ce.evaluate(model, digits, [CLEAN], out=tmp_path, batch_size=size, allow_batch_dependent=True)
    found = {r["protocol"]["model"]["batch_size"]: r["measurements"][0]["value"] for r in Store(tmp_path).records()}
    assert found == {size: right_accuracy(model, digits, size) for size in (8, 20)}
    assert ce.Run(tmp_path).table()["checkpoint"].nunique() == 2
    plain = own_head(digits)
    planned = evaluation.plan(plain, digits, tasks=[CLEAN], out=tmp_path, allow_batch_dependent=True)
    assert "batch_size" not in planned.subjects[0].model.protocol()


@pytest.mark.parametrize("arch", ["resnet18", "rf29_resnet18", "convnext_tiny", "timm:vit_tiny_patch16_224"])
def test_rounding_is_no_batch_dependence(arch: str) -> None:
    model = make_model(arch, img_size=32 if "vit" in arch else None)
    seen = observe(model, (32, 32), torch.device("cpu"))
    assert batch_dependence(seen) is None
    assert apart(seen.outputs.float().double(), seen.outputs) == 0
    assert apart(seen.outputs.roll(1, 0), seen.outputs) > 0.5


def test_a_pivot_does_not_average_trained_and_untrained(digits: Dataset, tmp_path: Path) -> None:
    model = own_head(digits)
    run = ce.evaluate(model, digits, [Redundancy()], out=tmp_path)
    table = run.table()
    metric = table["metric"].iloc[0]
    pivot = table[table["metric"] == metric].pivot(index="model", columns="site", values="value")  # twins would raise
    by_weights = {r["params"]["weights"]: r["measurements"] for r in Store(tmp_path).records()}
    for weights, name in (("trained", model.name), ("untrained", f"{model.name}, untrained")):
        (value,) = (m["value"] for m in by_weights[weights] if m["metric"] == metric)
        assert pivot.loc[name].item() == value


def test_the_table_of_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no finished cells in .*typo"):
        ce.Run(tmp_path / "typo").table()


@pytest.mark.parametrize("side", [32, 64])
def test_a_fixed_size_network_is_timed_as_it_is_used(side: int, digits: Dataset, tmp_path: Path) -> None:
    model = make_model("timm:vit_tiny_patch16_224", img_size=side)
    sizes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _module, args: sizes.append(args[0].shape[-1]))
    planned = evaluation.plan(model, digits, tasks=[Redundancy()], out=tmp_path)
    seconds = planned.seconds()
    assert seconds is not None
    assert seconds > 0
    assert set(sizes) == {side}


def test_pixels_take_no_cells_of_the_models_after_them(digits: Dataset, tmp_path: Path) -> None:
    pixels, after = ce.load_model("pixels:8"), make_model("resnet18", stem="cifar", width=8)
    run = ce.evaluate([pixels, after], digits, [Redundancy()], out=tmp_path)
    assert run.failures == ()
    found = [(record["model"], record["params"]["weights"]) for record in Store(tmp_path).records()]
    assert sorted(found) == sorted([(pixels.name, "trained"), (after.name, "trained"), (after.name, "untrained")])


def test_a_test_split_alone_measures_what_it_allows(digits: Dataset, tmp_path: Path) -> None:
    alone, model = replace(digits, train=None), own_head(digits)
    planned = evaluation.plan(model, alone, out=tmp_path)
    assert {cell["task"] for cell in planned.cells} == {"corruptions", "attacks", "internal", "crops", "redundancy"}
    assert [line.partition(":")[0] for line in planned.skipped] == [f"probe of {model.name}"]
    headless = evaluation.plan(model.untrained(0), alone, out=tmp_path)
    assert {cell["task"] for cell in headless.cells} == {"redundancy"}
    assert len(headless.skipped) == 5


def test_python_is_told_what_the_command_line_prints(digits: Dataset, tmp_path: Path) -> None:
    save_model(own_head(digits), tmp_path / "own.safetensors")
    torch.save(make_model("resnet18", width=8).backbone.network.state_dict(), tmp_path / "plain.pth")
    with pytest.warns(CossWarning, match="ASSUMED"):
        model = ce.load_model(tmp_path / "plain.pth")
    with pytest.warns(CossWarning) as caught:
        run = ce.evaluate(model, replace(digits, train=None), [CLEAN], out=tmp_path / "out")
    said = [str(warning.message) for warning in caught]
    assert any("ASSUMED" in line for line in said)
    assert any("not done" in line and "no training split" in line for line in said)
    ours = [warning for warning in caught if warning.category is CossWarning]
    assert all(Path(warning.filename) == Path(__file__) for warning in ours)
    assert len(run.failures) == 1
    with pytest.raises(UsageError, match="no training split"):
        run.table()


# --- end of evaluation ------------------------------------------------------------------------------------------------
