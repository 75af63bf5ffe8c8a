"""The walks of docs/architecture.md, made: the code enters the files that it names, one after the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import FILES, save

import coss_eval as ce
from coss_eval import cli
from coss_eval.checkpoints.load import make_model, save_model

PACKAGE = Path(ce.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def walks() -> dict[str, list[str]]:
    """By title, the files in their order."""
    _, *sections = PAGE.read_text().split("\n### ")
    return {section.splitlines()[0]: re.findall(r"^\d+\. `([\w/.]+)`", section, re.MULTILINE) for section in sections}


def entered(walk: Callable[[], object]) -> list[str]:
    """The package's files as the main thread goes from one to another, by calling a function of theirs."""
    seen: list[str] = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        # a module's and a class's own code runs when it is imported
        if event == "call" and frame.f_code.co_flags & CO_OPTIMIZED and path.startswith(str(PACKAGE)):
            file = path.removeprefix(f"{PACKAGE}/")
            if seen[-1:] != [file]:
                seen.append(file)

    sys.setprofile(look)
    try:
        walk()
    finally:
        sys.setprofile(None)
    return seen


def checkpoint(folder: Path) -> Callable[[], object]:
    file = save(FILES["MoCo v3, ResNet"]().content, folder / "moco.pth")
    pixels = torch.rand(1, 3, 32, 32)

    def walk() -> object:
        model = ce.load_model(file)
        return ce.fit_classifier(model, data, cache=False, device="cpu")(pixels)

    data = ce.load_dataset("digits")
    return walk


def eps(folder: Path) -> Callable[[], object]:
    file, out = folder / "model.safetensors", folder / "out"
    save_model(make_model("resnet18", stem="cifar", width=8), file)
    flags = f"--ckpt {file} --data digits --eps 8/255 --steps 2 --limit 20 --out {out} --device cpu --quiet"

    def walk() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["coss-eval", "attacks", *flags.split()])
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main()
        return (out / "report.md").read_text()

    return walk


def view(folder: Path) -> Callable[[], object]:
    from PIL import Image

    for split, name, i in ((split, name, i) for split in ("train", "val") for name in "ab" for i in range(8)):
        file = folder / "set" / split / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 16 * i, np.uint8)).save(file)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "holdout": 0.0, "probe_every": 0, "size": 32}
    recipe = {"recipe": "imagenet"}  # with the blur

    def walk() -> object:
        data = ce.load_dataset(folder / "set")
        return ce.train("byol", data, preset="digits-tiny", out=folder / "run", device="cpu", **options, **recipe)

    return walk


WALKS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "A checkpoint's path to a logit": checkpoint,
    "An eps list to the number in the report": eps,
    "An image file to a training view": view,
}


@pytest.mark.slow
@pytest.mark.parametrize("title", WALKS)
def test_the_code_goes_the_way_that_the_page_tells(title: str, tmp_path: Path) -> None:
    gone = iter(entered(WALKS[title](tmp_path)))
    # each is entered some time after the one before it: ``in`` reads an iterator up to what it finds
    assert [file for file in walks()[title] if file not in gone] == []


def test_every_walk_is_told_and_its_number_of_files_is_right() -> None:
    _, *sections = PAGE.read_text().split("\n### ")
    assert list(walks()) == list(WALKS)
    for section, files in zip(sections, walks().values(), strict=True):
        assert len(set(files)) == len(files)
        assert re.search(rf"^{len(files)} files", section, re.MULTILINE)
