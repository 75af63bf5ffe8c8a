"""What ``import coss_eval as ce`` shows: every public name and every room, and no torch until one is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import coss_eval as ce
from coss_eval.errors import UsageError

ROOMS = {
    path.stem if path.suffix else path.name
    for path in Path(ce.__file__).parent.iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
} - {"cli", "runtime"}

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BYTES = (255 * IMAGES).to(torch.uint8)


def test_dir_is_complete_and_everything_in_it_is_there() -> None:
    assert set(dir(ce)) == {*ce.__all__, *ROOMS}
    for name in dir(ce):
        assert getattr(ce, name) is not None
    for room in (ce.attacks, ce.corruptions):
        assert all(hasattr(room, name) for name in dir(room))
    with pytest.raises(AttributeError, match="no attribute 'attack'"):
        _ = ce.attack


def test_importing_and_looking_round_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, coss_eval as ce; dir(ce); ce.attacks; ce.corruptions; ce.errors; ce.tasks\n"
    code += "assert not {'torch', 'pandas'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_ids_images_are_numbered() -> None:
    assert torch.equal(
        ce.corruptions.corrupt(BYTES, "gaussian_noise", 3),
        ce.corruptions.corrupt(BYTES, "gaussian_noise", 3, torch.arange(4)),
    )
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).eval()
    labels = classifier(IMAGES).argmax(1)
    plain, given = (ce.attacks.pgd(classifier, IMAGES, labels, [0.001, 0.01], ids) for ids in (None, torch.arange(4)))
    assert torch.equal(plain.images(0.01), given.images(0.01))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).eval()
    moved = [ce.attacks.representation(encoder, IMAGES, 0.01, ids).distance for ids in (None, torch.arange(4))]
    assert torch.equal(*moved)


def test_damage_without_ids_is_that_of_numbered_images() -> None:
    network = ce.as_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    encoder, found = network.encoder(), []
    for ids in (None, torch.arange(4)):
        with ce.internal.corrupted(encoder, "prepool", "element", 0.5, ids):
            found.append(encoder(IMAGES))
    assert torch.equal(*found)
    assert not torch.equal(found[0], encoder(IMAGES))


def test_adversarial_images_are_asked_for_by_eps() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).eval()
    result = ce.attacks.fgsm(classifier, IMAGES, classifier(IMAGES).argmax(1), [2 / 255, 8 / 255])
    assert torch.equal(result.images(8 / 255), result.adversarial(1))
    assert torch.equal(result.images(0.0078), result.adversarial(0))
    with pytest.raises(UsageError, match=r"eps 0.02 was not attacked: choose one of 0.00784314, 0.0313725"):
        result.images(0.02)
