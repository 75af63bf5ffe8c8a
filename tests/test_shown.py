"""What Python shows a person who evaluates or trains: an estimate, progress, warnings; and what an interrupt leaves."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coss_eval as ce
from coss_eval import evaluation
from coss_eval.data.dataset import Dataset
from coss_eval.errors import CossWarning
from coss_eval.evaluation import Progress
from coss_eval.models.classifier import to_float
from coss_eval.models.model import Model
from coss_eval.runtime import live
from coss_eval.store import Cell, Store
from coss_eval.tasks.task import Result, Subject, Task
from coss_eval.training.loop import TrainingProgress

TINY: dict[str, Any] = {
    "preset": "digits-tiny",
    "device": "cpu",
    "epochs": 2,
    "batch_size": 64,
    "probe_every": 0,
    "log_every": 5,
    "width": 8,
}


@dataclass(frozen=True)
class Count(Task):
    """How many images there are, in so many cells; interrupts at one of them."""

    name = "count"
    uses_head = False
    version = 1
    cells_: int = 3
    stop_at: int | None = None

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        return [Cell(self.name, {"number": number}) for number in range(self.cells_)]

    def measure(self, cell: Cell, subject: Subject) -> Result:
        if cell.params["number"] == self.stop_at:
            raise KeyboardInterrupt
        return Result([ce.store.Measurement("images", float(len(subject.data.test)), len(subject.data.test))])


@dataclass(frozen=True)
class Passes(Task):
    """Passes over all images: one in the first cell, nine in the second."""

    name = "passes"
    uses_head = False
    version = 1

    def cells(self, subject: Subject, seed: int) -> list[Cell]:
        return [Cell(self.name, {"passes": passes}) for passes in (1, 9)]

    def forwards(self, cell: Cell, subject: Subject) -> float:
        return float(cell.params["passes"] * len(subject.data.test))

    def measure(self, cell: Cell, subject: Subject) -> Result:
        network = subject.model.encoder()
        for _ in range(cell.params["passes"]):
            for batch in subject.batches():
                network(to_float(batch.images))
        return Result([ce.store.Measurement("images", 1.0, len(subject.data.test))])


@pytest.fixture(scope="module")
def few() -> Dataset:
    return ce.load_dataset("digits")


@pytest.fixture(scope="module")
def raw() -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CossWarning)
        return ce.load_model("pixels:8")


def test_estimate_progress_and_warnings_are_shown_and_quiet_silences_them(
    few: Dataset, raw: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(CossWarning, match="ASSUMED"):
        ce.evaluate(raw, few, [Count()], out=tmp_path / "shown", limit=20, device="cpu")
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("3 of 3 cells to compute; estimate ")
    estimate = lines[0].rpartition("estimate ")[2]
    assert lines[1] == f"[0/3 steps, 0 %, {estimate} left] count"
    assert lines[-1] == "[3/3 steps] done"
    with warnings.catch_warnings():
        warnings.simplefilter("error", CossWarning)
        ce.evaluate(raw, few, [Count()], out=tmp_path / "quiet", limit=20, device="cpu", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_shown_where_nothing_is_left_or_the_caller_shows_it(
    few: Dataset, raw: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []
    for _ in range(2):
        with pytest.warns(CossWarning, match="ASSUMED"):
            ce.evaluate(raw, few, [Count()], out=tmp_path, limit=20, device="cpu", on_progress=seen.append)
    assert [now.done for now in seen] == [0, 1, 2, 3, 0]
    assert capfd.readouterr().err == ""


def test_progress_goes_by_cost_and_moves_inside_a_long_cell(
    few: Dataset, raw: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two cells the second costs nine times the first, in passes over batches, each of which is told."""
    monkeypatch.setattr(evaluation.progress, "SELDOM", 0.0)
    seen: list[Progress] = []
    task = Passes()
    run = ce.evaluate(
        raw, few, [task], out=tmp_path, limit=20, batch_size=5, device="cpu", on_progress=seen.append, on_note=print
    )
    assert run.failures == ()
    assert [now.done for now in seen] == [0] * 5 + [1] * 37 + [2]
    shares = [now.share for now in seen if now.share is not None]
    assert len(shares) == len(seen)
    assert shares == sorted(shares)
    assert shares[5] == pytest.approx(0.1)  # the first cell is done
    assert shares[5 + 18] == pytest.approx(0.1 + 0.9 / 2)
    assert shares[-1] == 1
    plan = evaluation.plan(raw, few, tasks=[task], out=tmp_path / "new", limit=20, batch_size=5, device="cpu")
    vars(plan)["costs"] = [100.0, 900.0]  # so long that the milliseconds before the first line do not count
    first: list[Progress] = []
    evaluation.execute(plan, on_progress=first.append)
    assert plan.seconds() == 1000
    assert first[0].seconds_left == pytest.approx(1000, rel=0.05)  # the plan and its line agree
    assert first[-1].seconds_left == 0


def test_an_interrupted_evaluation_keeps_its_cells_and_goes_on(few: Dataset, raw: Model, tmp_path: Path) -> None:
    def run(task: Task) -> ce.Run:
        return ce.evaluate(raw, few, [task], out=tmp_path, limit=20, device="cpu")

    with pytest.raises(KeyboardInterrupt), pytest.warns(CossWarning, match="interrupted: every finished cell is kept"):
        run(Count(stop_at=1))
    assert len(Store(tmp_path).records()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CossWarning)
        assert len(run(Count()).table()) == 3


@pytest.mark.slow
def test_training_shows_its_line_and_goes_on_after_an_interrupt_in_its_first_epoch(
    few: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(now: TrainingProgress) -> None:
        assert now.epoch == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ce.train("simclr", few, out=tmp_path / "stopped", on_progress=stop, **TINY)
    assert capfd.readouterr().err == ""
    resumed = ce.train("simclr", few, out=tmp_path / "stopped", resume=True, **TINY)
    assert "simclr   epoch 2/2   loss" in capfd.readouterr().err.splitlines()[-1]
    whole = ce.train("simclr", few, out=tmp_path / "whole", quiet=True, **TINY)
    assert capfd.readouterr().err == ""
    assert resumed.sha256 == whole.sha256


def test_extract_and_fit_classifier_say_how_far_they_are_where_they_take_seconds(
    few: Dataset, raw: Model, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert few.train is not None
    ce.extract(raw, few, cache=False, device="cpu")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(live, "SILENT", 0.0)  # as if it had taken so long
    ce.extract(raw, few, cache=False, device="cpu")
    ends = [f"features of {raw.name}: {n:,} of {n:,} images" for n in (len(few.test), len(few.train))]
    assert capfd.readouterr().err.splitlines()[-1] == ends[0]
    ce.fit_classifier(raw, few, cache=False, device="cpu")
    assert ends[1] in capfd.readouterr().err.splitlines()
    ce.extract(raw, few, cache=False, device="cpu", quiet=True)
    ce.fit_classifier(raw, few, cache=False, device="cpu", quiet=True)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_in_a_notebook_one_output_is_replaced_in_place() -> None:
    pytest.importorskip("ipykernel")
    client, formats = pytest.importorskip("nbclient"), pytest.importorskip("nbformat.v4")
    code = (
        "from coss_eval.runtime.live import live_line\n"
        "with live_line() as line:\n"
        "    for step in range(3):\n"
        "        line(f'step {step}', step == 2)"
    )
    book = formats.new_notebook(cells=[formats.new_code_cell(code)])
    client.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    outputs = book.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"]
    assert outputs[0].data == {"text/plain": "step 2"}


def test_a_notebook_shows_a_dataset_with_a_small_grid_and_a_model_with_its_facts(few: Dataset, raw: Model) -> None:
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    shown = few._repr_html_()
    assert "451" in shown
    assert len(shown) < 100_000
    png = b64decode(shown.partition("base64,")[2].partition('"')[0])
    assert Image.open(BytesIO(png)).size == (8 * 32, 3 * 32)
    one = replace(few, name="<i>", test=few.test.subset([5]))
    assert "&lt;i&gt;" in one._repr_html_()
    (image,) = next(one.test.batches()).images
    png = b64decode(one._repr_html_().partition("base64,")[2].partition('"')[0])
    assert (np.asarray(Image.open(BytesIO(png))) == image.permute(1, 2, 0).numpy()).all()
    facts = replace(raw, name="<script>")._repr_html_()
    assert "&lt;script&gt;" in facts
    assert raw.sha256[:16] in facts
    assert "192 features" in facts
