"""A corrupted copy, written and evaluated: exactly the verdicts of pixels corrupted on the fly, under other keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import coss_eval as ce
from coss_eval import evaluation
from coss_eval.checkpoints.load import make_model
from coss_eval.corruptions.names import SEVERITIES
from coss_eval.data.batches import Geometry
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models.model import Model
from coss_eval.store import Store
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.corruptions.write import MANIFEST, Copy, write_copy
from coss_eval.tasks.redundancy.task import Redundancy

NAMES = ("impulse_noise", "fog")
TASK = Corruptions(NAMES)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = load_dataset("digits")
    assert data.train is not None
    return replace(data, train=data.train.limited(100, 0), test=data.test.limited(40, 0))


@pytest.fixture(scope="module")
def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model("resnet18", stem="cifar", width=16, classes=[str(i) for i in range(10)])


def copy_of(data: Dataset, out: Path, layout: str = "npy", task: Corruptions = TASK, **options: object) -> Copy:
    return Copy(data, out, task, layout, Geometry(48), **options)  # type: ignore[arg-type]


def verdicts(folder: Path) -> dict[str, pd.DataFrame]:
    """Verdicts by corruption, indexed by sample id."""
    store = Store(folder)
    return {r["params"]["corruption"]: store.samples(r["key"]).sort_index() for r in store.records()}  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["npy", "folders"])
def test_a_copy_gives_the_verdicts_of_the_fly(layout: str, digits: Dataset, model: Model, tmp_path: Path) -> None:
    ce.evaluate(model, digits, [TASK], out=tmp_path / "fly")
    assert write_copy(copy_of(digits, tmp_path / "copy", layout)) == (2, 0)
    ce.evaluate(model, load_dataset(tmp_path / "copy", clean=digits), [TASK], out=tmp_path / "files")
    fly, files = verdicts(tmp_path / "fly"), verdicts(tmp_path / "files")
    assert fly.keys() == files.keys() == {"clean", *NAMES}
    for name in fly:
        pd.testing.assert_frame_equal(fly[name], files[name])
    assert 0 < fly["fog"].to_numpy().mean() < 1


def test_varying_sizes_are_copied_in_one_geometry(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, side in enumerate((130, 150, 200, 99)):
        folder = tmp_path / "set" / "test" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side + 9, 3), np.uint8)).save(folder / f"{i}.jpg")
    data = load_dataset(tmp_path / "set")
    write_copy(copy_of(data, tmp_path / "copy", "folders", Corruptions(("fog",), (2, 4))))
    copied = load_dataset(tmp_path / "copy")
    assert isinstance(copied, Benchmark)
    assert copied.severities == {"fog": (2, 4)}
    assert copied.test.native_size == (48, 48)
    made = {int(i): image for _, _, images, ids in pieces(data) for i, image in zip(ids, images, strict=True)}
    assert len(made) == 4
    matched = load_dataset(tmp_path / "copy", clean=data)
    assert isinstance(matched, Benchmark)
    for batch in matched.condition("fog", 4).batches():
        for image, id_ in zip(batch.images.numpy(), batch.ids.tolist(), strict=True):
            assert np.array_equal(image.transpose(1, 2, 0), made[id_])


def pieces(data: Dataset) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    copy = copy_of(data, Path("unused"), "folders", Corruptions(("fog",), (4,)))
    return [(s, row, images, data.test.ids[row : row + len(images)]) for s, row, images in copy.pieces("fog", (4,))]


@pytest.mark.slow
def test_numbers_of_files_and_of_the_fly_never_share_a_key(digits: Dataset, model: Model, tmp_path: Path) -> None:
    write_copy(copy_of(digits, tmp_path / "a"))
    write_copy(copy_of(digits, tmp_path / "b", seed=1))
    for data in (digits, load_dataset(tmp_path / "a", clean=digits), load_dataset(tmp_path / "b", clean=digits)):
        ce.evaluate(model, replace(data, name="same"), [TASK], out=tmp_path / "out")
    records = Store(tmp_path / "out").records()
    assert len({record["key"] for record in records}) == 3 * 3
    pixels = [record["params"].get("pixels") for record in records]
    assert (pixels.count("files"), pixels.count(None)) == (6, 3)
    table = evaluation.Run(tmp_path / "out").table()
    assert not table.duplicated(["checkpoint", "metric", "condition"]).any()  # each in a column of its own


@pytest.mark.slow
def test_a_probe_needs_the_clean_dataset(digits: Dataset, model: Model, tmp_path: Path) -> None:
    write_copy(copy_of(digits, tmp_path / "copy"))
    headless = replace(model, head=None, classes=None)
    alone = load_dataset(tmp_path / "copy")
    with pytest.raises(UsageError, match="add --clean DATA"):
        evaluation.plan(headless, alone, tasks=[TASK], out=tmp_path / "out")
    with_clean = load_dataset(tmp_path / "copy", clean=digits)
    run = ce.evaluate(headless, with_clean, [Corruptions(("fog",), (1, 5))], out=tmp_path / "out", limit=20)
    assert run.failures == ()
    assert set(run.table()["n"]) == {20}
    own = ce.evaluate(model, alone, [TASK], out=tmp_path / "own")
    assert "clean" not in set(own.table()["corruption"])


def test_what_a_benchmark_cannot_do(digits: Dataset, model: Model, tmp_path: Path) -> None:
    write_copy(copy_of(digits, tmp_path / "copy"))
    data = load_dataset(tmp_path / "copy", clean=digits)
    for tasks, message in [
        ([Redundancy()], "for the task corruptions, not redundancy"),
        ([Corruptions(("fog",), flavour="imagenet-c")], "made already"),
        ([Corruptions(("frost",))], "holds no frost; it has impulse_noise, fog"),
    ]:
        with pytest.raises(UsageError, match=message):
            evaluation.plan(model, data, tasks=tasks, out=tmp_path / "out")
    with pytest.raises(UsageError, match="corrupted already"):
        write_copy(copy_of(data, tmp_path / "again"))


def test_a_copy_is_only_gone_on_with_as_it_was_begun(digits: Dataset, tmp_path: Path) -> None:
    write_copy(copy_of(digits, tmp_path / "copy", task=Corruptions(("fog",))))
    assert write_copy(copy_of(digits, tmp_path / "copy")) == (1, 1)
    with pytest.raises(UsageError, match="was made with seed 0, not 1"):
        write_copy(copy_of(digits, tmp_path / "copy", seed=1))
    manifest = tmp_path / "copy" / MANIFEST
    there = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(there | {"device": "cuda"}))
    with pytest.raises(UsageError, match="was made with device cuda, not cpu"):
        write_copy(copy_of(digits, tmp_path / "copy"))
    manifest.write_text(json.dumps({name: value for name, value in there.items() if name != "device"}))
    assert write_copy(copy_of(digits, tmp_path / "copy")) == (0, 2)  # of before the entry, when only CPUs wrote any
    with pytest.raises(UsageError, match="was made with layout npy"):
        write_copy(copy_of(digits, tmp_path / "copy", "folders"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="something else"):
        write_copy(copy_of(digits, tmp_path / "full"))
    with pytest.raises(UsageError, match="--layout folders"):
        write_copy(copy_of(digits, tmp_path / "some", task=Corruptions(NAMES, (1, 2))))
    (tmp_path / "file").touch()
    with pytest.raises(CossError):
        write_copy(copy_of(digits, tmp_path / "file" / "below"))


SCRIPT = """
import sys
from pathlib import Path
from dataclasses import replace
from coss_eval.tasks.corruptions.write import Copy, write_copy
from coss_eval.data.batches import Geometry
from coss_eval.data.open import load_dataset
from coss_eval.tasks.corruptions.task import Corruptions
data = load_dataset("digits")
data = replace(data, test=data.test.limited(80))
write_copy(Copy(data, Path(sys.argv[1]), Corruptions(), sys.argv[2], Geometry()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "done"), [("npy", "*_*.npy"), ("folders", "*/[12345]")])
def test_kill_9_keeps_what_is_complete(layout: str, done: str, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), layout], env=os.environ)
    deadline = time.monotonic() + 60
    while len(list(out.glob(done))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob(done)}
    assert before
    data = load_dataset("digits")
    data, names = replace(data, test=data.test.limited(80)), ("gaussian_noise", "shot_noise", "impulse_noise")
    write_copy(copy_of(data, out, layout, Corruptions(names)))
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    whole = load_dataset(out)
    assert isinstance(whole, Benchmark)
    for name in names:
        for severity in SEVERITIES:
            assert sum(len(batch.ids) for batch in whole.condition(name, severity).batches()) == len(data.test)
    assert not list(out.rglob(".lock"))
    assert not [path for path in out.rglob(".*.tmp") if path.parent.name in names]
