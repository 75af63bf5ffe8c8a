"""The datasets of written_datasets.py as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from written_datasets import CLASSES, FORMATS, Written, image_of


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    """The same dataset in each layout."""
    return FORMATS[request.param](tmp_path / "set")


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of images whose sizes differ, wide, tall and smaller than the crop, as JPEG and PNG."""
    folder = tmp_path_factory.mktemp("varied")
    sizes = [(90, 60), (61, 97), (40, 40), (33, 120), (200, 150), (64, 65), (20, 30), (128, 128)]
    for split in ("train", "test"):
        for i, (height, width) in enumerate(sizes):
            coarse = image_of(split, 0, i, 8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            file = folder / split / CLASSES[i % 2] / f"{i}.{'jpg' if i % 3 else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return folder
