"""The gallery has every corruption once, and refuses what is no photograph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coss_eval.corruptions import NAMES, corrupt
from coss_eval.errors import UsageError
from coss_eval.reports.gallery import GAP, HEAD, LABELS, MARGIN, gallery, read_photograph


@pytest.mark.slow
def test_thumbnails_are_the_corrupted_photograph(tmp_path: Path) -> None:
    page = np.asarray(Image.open(gallery(tmp_path)))
    thumb = (page.shape[0] - HEAD - MARGIN) // len(NAMES) - GAP
    photograph, ids = read_photograph(None), torch.zeros(1, dtype=torch.int64)
    for name, severity in (("gaussian_noise", 1), ("saturate", 5), ("fog", 3)):
        top, left = HEAD + NAMES.index(name) * (thumb + GAP), MARGIN + LABELS + (severity - 1) * (thumb + GAP)
        shown = page[top : top + thumb, left : left + thumb].astype(float)
        expected = corrupt(photograph, name, severity, ids, table="imagenet")[0].permute(1, 2, 0).numpy()
        assert np.abs(shown.mean((0, 1)) - expected.mean((0, 1))).max() < 1


def test_what_is_no_photograph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for file in (tmp_path / "notes.txt", tmp_path / "absent.jpg"):
        with pytest.raises(UsageError, match=r"cannot read .* as an image"):
            gallery(tmp_path, image=file)
