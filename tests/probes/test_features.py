"""Features: the same whatever the batch size, the network untouched, what is cached and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probes_models import make_model
from small_networks import FAMILIES
from torch import nn

from coss_eval.data.dataset import Dataset
from coss_eval.data.split import Split
from coss_eval.errors import UsageError
from coss_eval.models.backbone import as_locations
from coss_eval.models.classifier import Classifier, to_float
from coss_eval.models.model import Model
from coss_eval.probes import cache
from coss_eval.probes.features import Features, extract, extract_known, protocol
from coss_eval.runtime.device import Compute

SITES = ("stage1", "stage2", "prepool", "global")


@pytest.fixture(scope="module")
def images(digits: Dataset) -> Split:
    return digits.test.limited(64)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_a_plain_forward_pass(family: str, images: Split) -> None:
    model = make_model(family, img_size=16)
    found = extract(model, images, sites=SITES, device="cpu", cache=False)
    pixels = to_float(next(images.batches(batch_size=len(images))).images)
    network = Classifier(model.backbone, nn.Identity(), model.preprocessing)
    with torch.no_grad():
        normalised = network.normalise(pixels)
        local = model.backbone.represent(normalised).local
        stage = {}
        handle = model.backbone.get_submodule(model.backbone.sites["stage1"].module).register_forward_hook(
            lambda _module, _inputs, output: stage.update(output=output.clone())
        )
        global_ = model.backbone(normalised)
        handle.remove()
    site = model.backbone.sites["stage1"]
    stage1 = as_locations(stage["output"], site.layout, site.prefix_tokens).mean(1)
    assert torch.equal(found.ids, torch.from_numpy(images.ids))
    assert torch.equal(found.labels, torch.from_numpy(images.labels))
    for name, expected in (("global", global_), ("prepool", local.mean(1)), ("stage1", stage1)):
        torch.testing.assert_close(found.values[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("family", ["cnn", "class token"])
def test_batch_size_does_not_matter(family: str, batch_size: int, images: Split) -> None:
    model = make_model(family, img_size=16)
    one = extract(model, images, sites=SITES, batch_size=batch_size, device="cpu", cache=False)
    whole = extract(model, images, sites=SITES, batch_size=256, device="cpu", cache=False)
    assert torch.equal(one.ids, whole.ids)
    for site in SITES:
        torch.testing.assert_close(one.values[site], whole.values[site], rtol=0, atol=1e-5)


def test_the_network_is_left_as_it_was(model: Model, images: Split) -> None:
    backbone = model.backbone.train().requires_grad_(True)
    backbone.layer1.eval()
    next(backbone.parameters()).requires_grad_(False)
    modes = [module.training for module in backbone.modules()]
    gradients = [parameter.requires_grad for parameter in backbone.parameters()]
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    precision, generator = torch.get_float32_matmul_precision(), torch.get_rng_state()
    found = extract(model, images, sites=SITES, device="cpu", cache=False)
    assert [module.training for module in backbone.modules()] == modes
    assert [parameter.requires_grad for parameter in backbone.parameters()] == gradients
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), generator)
    value = found.values["global"]
    assert not value.is_inference()
    assert not value.requires_grad


def test_hooks_go_when_a_pass_fails(model: Model, images: Split) -> None:
    model.backbone.layer2 = nn.Linear(5, 5)  # fits nothing
    with pytest.raises(RuntimeError):
        extract(model, images, sites=SITES, device="cpu", cache=False)
    assert not any(module._forward_hooks for module in model.backbone.modules())


def test_cached_features_are_the_same(model: Model, images: Split) -> None:
    first = extract(model, images, sites=("global", "stage1"), device="cpu")
    again = extract(model, images, sites=("stage1", "global"), device="cpu")
    assert (first.cached, again.cached) == (False, True)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.labels, again.labels)
    assert set(again.values) == {"global", "stage1"}
    assert all(torch.equal(first.values[site], again.values[site]) for site in again.values)


def test_no_cache_neither_reads_nor_writes(model: Model, images: Split, cache_folder: Path) -> None:
    extract(model, images, device="cpu", cache=False)
    assert not list(cache_folder.iterdir())
    extract(model, images, device="cpu")
    assert not extract(model, images, device="cpu", cache=False).cached


def test_what_features_depend_on_is_in_their_protocol(model: Model, digits: Dataset) -> None:
    images = digits.test.limited(64)
    protocols = [
        protocol(model, images),
        protocol(make_model(seed=1), images),
        protocol(make_model(img_size=16), images),
        protocol(model, digits.test.limited(65)),
        protocol(model, images, ("prepool",)),
    ]
    assert all(a != b for i, a in enumerate(protocols) for b in protocols[:i])
    assert protocol(make_model(), digits.test.limited(64)) == protocols[0]


def test_a_damaged_cache_is_computed_again(model: Model, images: Split, cache_folder: Path) -> None:
    first = extract(model, images, device="cpu")
    (file,) = cache_folder.glob("features-*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), content[:100], b"", b"not an archive"):
        file.write_bytes(damaged)
        again = extract(model, images, device="cpu")
        assert not again.cached
        assert torch.equal(again.values["global"], first.values["global"])
        assert extract(model, images, device="cpu").cached


def test_features_beyond_the_caches_limit_are_made_once_a_run(
    model: Model, images: Split, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in a file without a name, which the next run does not find."""
    monkeypatch.setenv("COSS_CACHE_GB", "0.000001")
    monkeypatch.setattr(cache, "MAPPED", 1)
    model = model.identified()
    run = Compute(torch.device("cpu"))
    with pytest.warns(UserWarning, match="GB of features exceed the cache's"):
        first = extract_known(model, images, run)
    again = extract_known(model, images, replace(run, batch_size=7))
    assert (first.cached, again.cached) == (False, True)
    assert torch.equal(again.values["global"], first.values["global"])
    assert not list(cache_folder.glob("*"))
    with pytest.warns(UserWarning, match="exceed"):
        assert not extract_known(model, images, Compute(torch.device("cpu"))).cached
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)  # it is another network now, whatever its name says
    with pytest.warns(UserWarning, match="exceed"):
        assert not extract_known(model, images, run).cached


def test_among_keeps_the_images_of_a_part(model: Model, digits: Dataset) -> None:
    assert digits.train is not None
    part, rest = digits.train.limited(200).holdout(0.25)
    found = extract(model, digits.train, device="cpu")
    assert isinstance(found.among(part), Features)
    for split in (part, rest):
        chosen = found.among(split)
        assert torch.equal(chosen.ids, torch.from_numpy(split.ids))
        assert torch.equal(chosen.labels, torch.from_numpy(split.labels))
        direct = extract(model, split, device="cpu").values["global"]
        torch.testing.assert_close(chosen.values["global"], direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sites", "message"), [(("stage9",), "no site 'stage9'"), ((), "no site to extract")])
def test_wrong_sites(model: Model, images: Split, sites: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        extract(model, images, sites=sites)
