"""A plain network in a person's hands becomes a Model that computes what it computes, and is left as it was."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import coss_eval as ce
from coss_eval.checkpoints.as_model import as_model
from coss_eval.checkpoints.measured import measured
from coss_eval.errors import CossWarning, UsageError
from coss_eval.internal import calibrate, corrupted
from coss_eval.models.model import Model
from coss_eval.receptive_field import effective, theoretical
from coss_eval.redundancy import measure
from coss_eval.runtime.code_identity import UNKNOWN

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
HALF = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


class Small(nn.Module):
    """Of nobody's family, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def made(kind: type[nn.Module] | str = Small) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet18(num_classes=4) if isinstance(kind, str) else kind()


@pytest.mark.parametrize("kind", [Small, "resnet18"])
def test_it_computes_what_the_network_does_and_leaves_it_alone(kind: type[nn.Module] | str) -> None:
    network = made(kind).train()
    before, keys = copy.deepcopy(network.state_dict()), list(dict(network.named_modules()))
    model = as_model(network, **HALF, head="own")
    assert model.head is not None
    found = model.head(model.encoder()(PIXELS))
    torch.testing.assert_close(found, network.eval()((PIXELS - 0.5) / 0.25), rtol=1e-4, atol=1e-4)
    assert list(dict(network.named_modules())) == keys
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_its_identity_is_its_weights_structure_and_cut() -> None:
    network = made()
    model = as_model(network)
    assert as_model(made()).protocol() == model.protocol()
    with torch.no_grad():
        network.fc.weight.add_(1)
    others = [as_model(network), as_model(made(), **HALF), as_model(made(), local="body.2"), as_model(made("resnet18"))]
    protocols = [str(one.protocol()) for one in (model, *others)]
    assert len(set(protocols)) == len(protocols)


def in_a_cell(forward: str) -> Model:
    """A network whose class a notebook's cell defines: no file, and its lines where Python looks for those of cells."""
    source = f"class Cell(Small):\n    gain = 2\n\n    def forward(self, x):\n        return {forward}\n"
    linecache.cache["<cell>"] = (len(source), None, source.splitlines(keepends=True), "<cell>")
    space = {"Small": Small, "__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), space)  # noqa: S102 - as a notebook does
    return as_model(made(space["Cell"]))  # type: ignore[arg-type]


def test_the_code_of_its_classes_is_in_its_identity_also_of_a_notebooks() -> None:
    assert as_model(made()).code not in (None, UNKNOWN)
    codes = [in_a_cell(forward).code for forward in ("super().forward(x)", "2 * super().forward(x)")]
    assert len({*codes, UNKNOWN}) == 3
    assert in_a_cell("super().forward(x)").code == codes[0]


def test_paths_names_and_models_go_through_the_same_door() -> None:
    model = ce.load_model("pixels:8")
    assert as_model(model) is model
    assert as_model("pixels:8").protocol() == model.protocol()
    assert as_model("pixels:8", name="raw").name == "raw"
    assert as_model(nn.DataParallel(made())).protocol() == as_model(made()).protocol()


def test_an_assumed_normalisation_is_told() -> None:
    with pytest.warns(CossWarning, match=r"Small: mean and std ASSUMED"):
        ce.as_model(made())


def test_a_timm_network_says_how_it_normalises_unless_it_was_made_for_other_classes() -> None:
    timm = pytest.importorskip("timm")
    own, other = (timm.create_model("resnet10t.c3_in1k", num_classes=n) for n in (1000, 10))
    assert as_model(own).preprocessing.said_by == "the network's pretrained_cfg"
    assert as_model(other).preprocessing.said_by is None


class Pair(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return x, x


WRONG = {
    "class": (Small, r"Small is a class, give one of it, Small\(...\)"),
    "state dict": (made().state_dict(), "a state dict has no network"),
    "number": (3, "a model is a path, a name, a Model or a torch.nn.Module, not int"),
    "two outputs": (Pair(), "Pair must return one tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_says_what_is_no_model(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message) as caught:
        as_model(given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_options_of_a_model_that_is_made_are_refused() -> None:
    with pytest.raises(UsageError, match="is a Model already"):
        as_model(as_model(made()), **HALF)


@pytest.mark.slow
def test_measures_take_the_network_and_pixels_in_0_to_1() -> None:
    network = made()
    model = as_model(network, **HALF)
    normalised = [(PIXELS - 0.5) / 0.25]
    expected, found = measure(model.backbone, normalised), measure(model, [PIXELS])
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist(), rel=1e-5, abs=1e-6, nan_ok=True)
    assert effective(model, [PIXELS]).size == effective(model.backbone, normalised).size
    assert theoretical(network, 32).equals(theoretical(network, 32))
    sites = calibrate(network, [PIXELS])
    torch.testing.assert_close(sites, calibrate(as_model(network).encoder(), [PIXELS]))


def test_measures_take_a_name_and_a_dataset() -> None:
    backbone, batches = measured("pixels:8", "digits")
    first = next(iter(batches()))  # type: ignore[operator]
    pixels = next(ce.load_dataset("digits").test.batches()).images
    torch.testing.assert_close(first, ce.load_model("pixels:8").encoder().normalise(pixels.float() / 255))
    assert backbone.dim == 192


def test_pixels_that_are_normalised_already_are_refused() -> None:
    with pytest.raises(UsageError, match=r"uint8 or floats in \[0, 1\], got torch.float32 from -"):
        measure(made(), [PIXELS - 0.5])


def test_damage_of_a_network_that_nobody_would_run_is_refused() -> None:
    with (
        pytest.raises(UsageError, match=r"as_model\(network\).encoder\(\)"),
        corrupted(made(), "prepool", "channel", 0.5, torch.arange(3)),  # type: ignore[arg-type]
    ):
        pass


class OfPixelsAndTime(nn.Module):
    def forward(self, pixels: Tensor, time: Tensor) -> Tensor:
        return pixels.mean((2, 3)) + time


NO_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two inputs": (OfPixelsAndTime, "with a batch of images alone .*'time'.*; wrap it in a module"),
    "lazy layers": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "lazy layers without weights: call it once"),
    "TorchScript": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), "give the network that it was made from"),
    "four channels": (lambda: nn.Conv2d(4, 4, 3), "Conv2d takes no colour or grey images .*4 channels"),
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_network_that_takes_no_batch_of_images_is_told_why(kind: str) -> None:
    make, message = NO_MODELS[kind]
    with pytest.raises(UsageError, match=message) as raised:
        ce.as_model(make())
    assert "\n" not in str(raised.value)
