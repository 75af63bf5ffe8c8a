"""Every entry of every registry: it says what it is and by whom, has its line in the list, and does its work small."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import FILES, resnet, save, under
from torch import nn
from written_benchmarks import write_arrays, write_folders
from written_datasets import FORMATS, write_flat_imagenet, write_idx

import coss_eval as ce
from coss_eval import tasks
from coss_eval.attacks import ATTACKS
from coss_eval.attacks.attack import Attack
from coss_eval.attacks.names import attack_named
from coss_eval.checkpoints import layouts as checkpoint_layouts
from coss_eval.checkpoints.load import make_model
from coss_eval.cli.check import check
from coss_eval.cli.describe import list_lines
from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.names import CATEGORIES
from coss_eval.corruptions.registry import CORRUPTIONS, Corruption
from coss_eval.corruptions.severity import SEVERITIES, TABLES
from coss_eval.data import layouts as data_layouts
from coss_eval.data.layouts import DataLayout
from coss_eval.errors import UsageError
from coss_eval.tasks.entry import TaskEntry
from coss_eval.tasks.task import Task
from coss_eval.training.config import resolve
from coss_eval.training.methods import METHODS, make_method, method_class

SOURCE = re.compile(r"[A-Z][\w-]+ .*\d{4}|github\.com/\w+|arXiv \d{4}|torch|datasets|Kaggle|MNIST|ImageNet|save_model")


@dataclass(frozen=True)
class Entry:
    """What a registry has of one entry. ``works``: does its work small, in a folder of its own, and asserts of it."""

    family: str  # of `coss-eval list`
    name: str
    about: str
    docstring: str | None
    source: str | None
    works: Callable[[Path], None]


def a_task(entry: TaskEntry) -> Entry:
    def works(folder: Path) -> None:
        made = entry.make()
        assert isinstance(made, Task)
        assert isinstance(made, entry.options)
        assert made.name == entry.name
        assert tasks.task_class(entry.name) is type(made)
        own = {field.name for field in fields(entry.options)}
        assert {field.name for field in fields(made)} == own  # type: ignore[arg-type]
        assert isinstance(entry.make(**entry.quick), Task)
        model = make_model("resnet18", stem="cifar", width=8)
        assert check([model], ce.load_dataset("digits"), names=[entry.name], device="cpu") == 0

    assert entry.options.__doc__  # the command's help, which names the sources
    assert all(year in entry.options.__doc__ for year in re.findall(r"\d{4}", entry.source))
    return Entry("tasks", entry.name, entry.about, entry.task_class().__doc__, entry.source, works)


def a_corruption(known: Corruption) -> Entry:
    def works(folder: Path) -> None:
        assert known.function.__name__ == known.name
        assert (known.name in NAMES) == (known.set != "extra")
        assert known.category in CATEGORIES
        assert {len(known.severities[table]) for table in TABLES} == {len(SEVERITIES)}
        assert known.code is None
        images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        made = corrupt(images, known.name, 5, torch.arange(2))
        assert (made.shape, made.dtype) == (images.shape, torch.uint8)
        assert not torch.equal(made, images)

    source = sys.modules["coss_eval.corruptions.names"].__doc__  # of all in the sets
    return Entry("corruptions", known.name, known.set, known.function.__doc__, source, works)


def an_attack(kind: type[Attack]) -> Entry:
    def works(folder: Path) -> None:
        attack = attack_named(kind.name)
        assert (attack.code, attack.norm) == (None, kind.norms[0])
        assert set(kind.norms) <= {"linf", "l2"}
        assert attack.forwards >= 3
        assert not (attack.single_step and attack.iterated)
        for option, value in {"steps": 2, "restarts": 2, "step_size": 0.1, "loss": "ce+dlr"}.items():
            assert (option in attack.options) == (option in kind.__dataclass_fields__)
            attack = replace(attack, **{option: value}) if option in attack.options else attack
        images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
        labels, ids, eps = network(images).argmax(1), torch.arange(4), [0.01, 0.9]
        result = attack(network, images, labels, eps, ids=ids)
        assert (result.attack, result.norm, result.swept) == (kind.name, kind.norms[0], not attack.single_step)
        assert result.robust.shape == (2, 4)
        assert torch.equal(attack(network, images, labels, eps).robust, result.robust)  # without ids 0, 1, ...
        if not kind.in_foolbox and "loss" not in attack.options:
            with pytest.raises(UsageError, match=f"no {kind.name}"):
                attack(network, images, labels, eps, ids=ids, backend="reference")

    return Entry("attacks", f"{kind.name}:{kind.norms[0]}", kind.about, kind.__doc__, kind.__doc__, works)


def a_method(name: str) -> Entry:
    kind = method_class(name)

    def works(folder: Path) -> None:
        assert kind.name == name
        options = dict(resolve(name, "digits-tiny").options)
        labelled = kind.targets == "labels"
        method = make_method(name, **options, **({"classes": 10} if labelled else {}))
        heads, vectors = method.heads(14), torch.randn(8, 14, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(8) if labelled else heads.projector(vectors).detach()
        loss = method.comparison()(heads(vectors), targets, torch.arange(8))
        assert loss.ndim == 0
        assert loss.isfinite()

    return Entry("methods", name, METHODS[name], kind.__doc__, METHODS[name], works)


def two_of_lightly() -> dict[str, object]:
    net = resnet(0)
    return {"state_dict": under("query_backbone.", net, without="fc.") | under("backbone.", net, without="fc.")}


FILE_OF = {  # the files of tests/checkpoints; each of the other rows has one of its own name
    "state dict": "torchvision reference",
    "weights with an average": "with an average",
    "lightly": "lightly, nn.Sequential",
    "lightly, student and teacher": "lightly, DINO",
    "MoCo": "MoCo v1",
    "MoCo v3": "MoCo v3, ResNet",
    "MoCo v3, linear": "MoCo v3, linear ViT",
    "DINO": "DINO, ResNet",
    "Hugging Face": "Hugging Face, ResNet",
    "BYOL (PyTorch-BYOL)": "PyTorch-BYOL",
    "SimCLR (github.com/sthalles)": "SimCLR, sthalles",
    "SimCLR (github.com/leftthomas)": "SimCLR, leftthomas",
    "mmselfsup": "mmselfsup, DenseCL",
    "Barlow Twins or VICReg": "Barlow Twins",
    "Lightning": "Lightning, model.",
}


def a_checkpoint_layout(layout: checkpoint_layouts.Layout) -> Entry:
    def works(folder: Path) -> None:
        assert layout.default in layout.branches
        of_lightly = layout.name == "lightly, query and key"
        content = two_of_lightly() if of_lightly else FILES[FILE_OF.get(layout.name, layout.name)]().content
        model = ce.load_model(save(content, folder / "file.pth"))
        assert model.layout == layout.name
        assert model.backbone.represent(torch.rand(1, 3, 64, 64)).global_.isfinite().all()

    return Entry("layouts", layout.name, layout.source, type(layout).__doc__, layout.source, works)


WRITERS: dict[str, Callable[[Path], object]] = {
    "parquet": FORMATS["Hugging Face"],
    "saved-to-disk": FORMATS["saved to disk"],
    "webdataset": FORMATS["WebDataset"],
    "idx": write_idx,
    "tiny-imagenet": FORMATS["Tiny-ImageNet"],
    "kaggle-imagenet": FORMATS["Kaggle"],
    "flat-imagenet": write_flat_imagenet,
    "corrupted-arrays": lambda folder: write_arrays(folder, ["fog", "snow"]),
    "corrupted-folders": lambda folder: write_folders(folder, ["fog", "snow"]),
    "listed": FORMATS["labels.csv"],
    "class-folders": FORMATS["class folders"],
}


def a_data_layout(layout: DataLayout) -> Entry:
    module, _, function = layout.reader.partition(":")
    reader = getattr(importlib.import_module(f"coss_eval.data.formats.{module}"), function)

    def works(folder: Path) -> None:
        WRITERS[layout.name](folder / "set")
        assert data_layouts.recognise(folder / "set") == layout
        data = ce.load_dataset(folder / "set")
        assert sum(len(batch.ids) for batch in data.test.batches()) == len(data.test) > 0

    return Entry("data-layouts", layout.name, layout.about, reader.__doc__, layout.about, works)


def every_entry() -> Iterator[Entry]:
    yield from map(a_task, tasks.built_in())
    yield from map(a_corruption, CORRUPTIONS.values())
    yield from map(an_attack, ATTACKS.values())
    yield from map(a_method, METHODS)
    yield from map(a_checkpoint_layout, checkpoint_layouts.LAYOUTS)
    yield from map(a_data_layout, data_layouts.LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [pytest.param(entry, id=f"{entry.family}-{entry.name}") for entry in every_entry()])
def test_each_entry_is_whole(entry: Entry, tmp_path: Path) -> None:
    assert entry.docstring
    assert entry.docstring.strip()
    assert SOURCE.search(entry.source or ""), entry.source
    # the name's column ends where it likes: two spaces or more
    listed = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in list_lines(entry.family)[1:]]
    assert listed.count([entry.name, entry.about]) == 1
    entry.works(tmp_path)


def test_every_registry_is_walked_and_no_name_is_there_twice() -> None:
    names = [(entry.family, entry.name) for entry in every_entry()]
    assert len(set(names)) == len(names)
    assert {family for family, _ in names} == {
        "tasks",
        "corruptions",
        "attacks",
        "methods",
        "layouts",
        "data-layouts",
    }
