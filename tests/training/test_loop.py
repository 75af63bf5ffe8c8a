"""Whole runs on a few digits: artefact, log, alarms, checkpoints, and every refusal."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_parts import COLLAPSED, DROPPING, HUNGRY, SMALL, TINY, TWO_CONVOLUTIONS, digits

from coss_eval.checkpoints.load import load_model
from coss_eval.cli.app import app
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.probes.features import extract
from coss_eval.training import checkpoint, config, log
from coss_eval.training.config import Config, presets, resolve
from coss_eval.training.dry_run import dry_run, relative_cost
from coss_eval.training.feed import Feed, statistics
from coss_eval.training.loop import Trainer, TrainingProgress, train
from coss_eval.training.methods import method_class, names
from coss_eval.training.monitor import Health, spread
from coss_eval.training.setup import Setup

ROOT = str(Path(__file__).parents[2])
HEADS: dict[str, dict[str, int]] = {
    "byol": {"hidden": 32},
    "dino": {"hidden": 32, "prototypes": 32, "bottleneck": 16},
}


def run(method: str, out: Path, **overrides: Any) -> Any:
    options = HEADS.get(method.removeprefix("co-"), {})
    return train(method, digits(), out=out, device="cpu", **{**TINY, **options, **overrides})


@pytest.mark.slow
def test_a_run_leaves_a_model_that_needs_no_flags_and_a_log(tmp_path: Path) -> None:
    seen: list[TrainingProgress] = []
    model = run("co-byol", tmp_path, epochs=3, holdout=0.25, probe_every=1, on_progress=seen.append)
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.sha256 == model.sha256
    assert loaded.preprocessing.mean == pytest.approx(model.preprocessing.mean)
    assert loaded.preprocessing.source == "checkpoint"
    data = digits()
    one, other = (extract(m, data.test, device="cpu", cache=False).values["global"] for m in (model, loaded))
    torch.testing.assert_close(one, other)
    lines = log.read(tmp_path)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["loss"] == pytest.approx(steps[0]["global"] + 0.3 * steps[0]["local"], rel=1e-5)
    probes = [line for line in lines if line["kind"] == "probe"]
    assert len(probes) == 3
    assert 0 <= probes[-1]["knn"] <= 1
    assert probes[-1]["effective_rank"] > 1
    assert (seen[-1].step, seen[-1].steps, seen[-1].epoch) == (6, 6, 3)


@pytest.mark.slow
def test_supervised_leaves_its_head_and_class_names(tmp_path: Path) -> None:
    model = run("supervised", tmp_path, epochs=2)
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.classes == model.classes == digits().classes
    assert loaded.head is not None


@pytest.mark.slow
def test_what_is_kept_on_the_way_is_as_complete_as_what_is_left(tmp_path: Path) -> None:
    run("supervised", tmp_path, epochs=2, keep_every=1)
    first, last = (load_model(tmp_path / f"epoch-000{epoch}.safetensors") for epoch in (1, 2))
    assert last.sha256 == load_model(tmp_path / "model.safetensors").sha256 != first.sha256
    assert first.classes == digits().classes


@pytest.mark.slow
def test_looking_on_the_way_changes_no_weight(tmp_path: Path) -> None:
    """Evaluations turn a network channels-last, in which narrow layers are not safe to train."""
    one, other = (run("byol", tmp_path / str(every), epochs=2, probe_every=every) for every in (0, 1))
    assert one.sha256 == other.sha256


@pytest.mark.slow
def test_an_alarm_reaches_the_person(tmp_path: Path) -> None:
    notes: list[str] = []
    run("byol", tmp_path, epochs=1, lr=0.0, probe_every=1, on_note=notes.append, **COLLAPSED)
    assert notes
    assert "epoch 1: the representation collapses" in notes[0]


def test_the_target_draws_nothing() -> None:
    task = Setup(resolve("byol", **{**TINY, **DROPPING}, hidden=32), digits(), torch.device("cpu"))
    assert task.objective.target is not None
    view = task.views_of(next(task.feed.epoch(0)), 0)[0]
    with torch.no_grad():
        target, online = task.objective.target.backbone, task.objective.backbone
        assert torch.equal(target(view), target(view))
        assert not torch.equal(online(view), online(view))


@pytest.mark.slow
def test_a_trained_model_is_not_called_untrained(tmp_path: Path) -> None:
    made, read = run("byol", tmp_path, epochs=1), load_model(tmp_path / "model.safetensors")
    assert made.layout == read.layout == "coss-eval"
    assert made.training() == read.training()
    assert made.training() == {
        "group": "byol",
        "seed": 0,
        "recipe": resolve("byol", **TINY | HEADS["byol"] | {"epochs": 1}).digest(),
    }


def test_runs_that_differ_in_their_seed_alone_have_one_digest() -> None:
    one = resolve("co-byol", "digits-tiny")
    assert replace(one, seed=5, probe_every=0).digest() == one.digest()
    others = [replace(one, lr=0.1), resolve("co-byol", "digits-tiny", local_weight=0.5), resolve("byol", "digits-tiny")]
    assert len({one.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.slow
def test_views_of_another_size_than_the_images_are_what_the_model_asks_for(tmp_path: Path) -> None:
    run("byol", tmp_path, epochs=1, size=48)
    assert load_model(tmp_path / "model.safetensors").preprocessing.img_size == 48


def test_simsiams_predictors_keep_their_rate() -> None:
    fields = {"hidden": 32, "bottleneck": 8}
    task = Setup(resolve("co-simsiam", **TINY, **fields), digits(), torch.device("cpu"))
    constant = {id(p) for group in task.optimizer().param_groups if group["constant"] for p in group["params"]}
    objective = task.objective
    assert objective.term is not None
    assert objective.term.heads is not None
    for heads in (objective.heads, objective.term.heads):
        assert {id(p) for p in heads.predictor.parameters()} <= constant
        assert not {id(p) for p in heads.projector.parameters()} & constant


def test_dino_hands_on_its_teacher() -> None:
    task = Setup(resolve("dino", **TINY, **HEADS["dino"]), digits(), torch.device("cpu"))
    assert task.objective.target is not None
    assert task.objective.kept is task.objective.target.backbone


def test_the_order_belongs_to_seed_and_epoch() -> None:
    data = digits().train
    assert data is not None
    feed = Feed(data, 32, torch.device("cpu"), seed=0, views=method_class("byol").views.at(32, variant="cifar"))
    assert feed.steps == 3
    ids = [torch.cat([batch.ids for batch in feed.epoch(epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    assert sorted(ids[0].tolist()) == sorted(data.ids.tolist())
    assert torch.equal(torch.cat([batch.ids for batch in feed.epoch(0, 2)]), ids[0][64:])
    other = Feed(data, 32, torch.device("cpu"), seed=1, views=feed.views)
    assert not torch.equal(ids[0], torch.cat([batch.ids for batch in other.epoch(0)]))


def test_statistics_are_those_of_all_pixels() -> None:
    data = digits().train
    assert data is not None
    pixels = torch.cat([batch.images for batch in data.batches()]).double() / 255
    mean, std = statistics(data, None)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-5)


def test_micro_batches_have_the_gradient_of_their_mean(tmp_path: Path) -> None:
    """With BatchNorm in eval mode, where images do not meet, four micro-batches are one batch."""
    weights = []
    for accumulate in (1, 4):
        made = Trainer(
            resolve("byol", **TINY, hidden=32, accumulate=accumulate), digits(), tmp_path, torch.device("cpu")
        )
        made.objective.eval()
        made.take_step(next(made.setup.feed.epoch(0)))
        weights.append(torch.cat([p.detach().flatten() for p in made.objective.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_with_its_step_and_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CossError, match=r"nan at step \d+ .*no checkpoint yet.*smaller lr"):
        run("byol", tmp_path / "a", epochs=2, lr=1e30, warm_up_epochs=0.0)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    made = Trainer(resolve("byol", **TINY, hidden=32, epochs=2), digits(), tmp_path / "b", torch.device("cpu"))
    made.out.mkdir()
    made._run_epoch()
    with torch.no_grad():
        made.objective.backbone.network.conv1.weight.mul_(torch.nan)
    with pytest.raises(CossError, match=r"nan at step 4 \(epoch 2\); the last good checkpoint is .*last\.pt"):
        made._run_epoch()
    assert all(value.isfinite().all() for value in checkpoint.load(made.out / "last.pt")["objective"].values())


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CossError, match=r"No space left.*last good state"):
        checkpoint.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_a_full_disk_at_the_state_leaves_the_epochs_kept_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        assert load_model(tmp_path / "epoch-0001.safetensors").layout == "coss-eval"  # is there already, and whole
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(CossError, match=r"last\.pt: No space left on device; make room and --resume"):
        run("byol", tmp_path, epochs=2, keep_every=1)
    monkeypatch.undo()
    run("byol", tmp_path, epochs=2, keep_every=1, resume=True)
    assert len(list(tmp_path.glob("epoch-*"))) == 2
    assert [line["step"] for line in log.read(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_told_where_it_shows_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = log.RunLog(tmp_path, 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CossError, match=r"log\.jsonl: No space left on device; make room and --resume"):
        lines.write("train", 1, loss=1.0)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write into .*file.*choose another folder"):
        run("byol", tmp_path / "file", epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "accumulate", "told"),
    [
        ("byol", 1, "with 32 images at a time; start again with --set accumulate=2, which keeps the batch of 32, or"),
        ("supervised", 2, "with 16 images at a time; start again with --set accumulate=4, which keeps the batch of 32"),
        ("simclr", 1, "with 32 images at a time; start again with --set batch_size=16; --dry-run says"),
    ],
)
def test_where_memory_runs_out_the_run_says_what_to_set(
    tmp_path: Path, method: str, accumulate: int, told: str
) -> None:
    fields = {**HUNGRY, "accumulate": accumulate}
    with pytest.raises(CossError, match=f"out of memory {told}"):
        run(method, tmp_path, **fields)
    with pytest.raises(CossError, match=f"out of memory {told}"):
        dry_run(resolve(method, **TINY | HEADS.get(method, {}) | fields), digits(), device="cpu")


def test_collapse_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(200, 16, generator=generator)
    constant = torch.ones(200, 16) + 1e-4 * healthy
    line = healthy[:, :1] * torch.ones(16)
    alarms = [Health(*spread(features)).alarm for features in (healthy, constant, line)]
    assert alarms[0] is None
    assert "standard deviation" in str(alarms[1])
    assert "effective rank" in str(alarms[2])


@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("preset", presets())
def test_every_preset_goes_with_every_method(preset: str, method: str) -> None:
    found = resolve(method, preset)
    assert (found.local is not None) == method.startswith("co-")
    assert Config.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@pytest.mark.parametrize("preset", presets())
def test_a_preset_opens_with_what_one_needs_to_know(preset: str) -> None:
    head = (Path(config.__file__).parent / "presets" / f"{preset}.yaml").read_text()
    assert all(f"# {word}:" in head for word in ("source", "expected", "command", "hours"))
    command = head.partition("# command: ")[2].partition("\n# hours")[0].replace("\\\n#", "")
    program, _, arguments = command.partition(" train ")
    assert program in ("coss-eval", "torchrun --nproc-per-node 8 -m coss_eval")
    _, bound, _ = app.parse_args(["train", *shlex.split(arguments)], exit_on_error=False, print_error=False)
    assert bound.arguments["preset"] == preset


def test_the_summary_says_whose_predictor_small_views_take() -> None:
    kinds = [("byol", {}), ("byol", {"small_predictor": "shared"}), ("dino", {})]
    told = [resolve(method, small_views=4, **fields).summary() for method, fields in kinds]
    assert [line.partition("4 small views")[2].partition(",")[0] for line in told] == [
        " with their own predictor",
        " with the full views' predictor",
        "",
    ]
    assert "small" not in resolve("byol").summary()


def test_presets_are_layered() -> None:
    assert resolve("simsiam", "cifar10-r18").optimizer == "sgd"
    laptop = resolve("byol", "tiny-imagenet-rf29-r18-laptop")
    assert (laptop.crop_min_scale, laptop.epochs, laptop.width, laptop.lr) == (0.3, 16, 16, 0.2)
    assert laptop.options == resolve("byol", "cifar10-r18-laptop").options == {"hidden": 1024, "out": 128}
    found = resolve("co-byol", "imagenet-rf99-r50-100ep", local_weight=0.5, hidden=64, epochs=30)
    assert (found.arch, found.batch_size, found.epochs, found.options["hidden"]) == ("rf99_resnet50", 4096, 30, 64)
    assert found.local is not None
    assert found.local.local_weight == 0.5


def test_a_preset_gives_its_stem_and_width_to_resnets_alone() -> None:
    shapes = {
        arch: (found.stem, found.width)
        for arch in ("resnet34", "rf29_resnet18", "resnext50_32x4d", "vit_d24_l2_h2_p8")
        for found in (resolve("byol", "cifar10-r18-laptop", arch=arch),)
    }
    assert list(shapes.values()) == [("cifar", 16), ("cifar", 16), ("cifar", 64), ("imagenet", 64)]
    assert resolve("byol", "cifar10-r18-laptop", arch="convnext_tiny", width=32).width == 32
    assert resolve("byol", "cifar10-r18-laptop", arch="torchvision:resnet18").width == 16


@pytest.mark.slow
def test_files_of_any_size_are_cropped_by_workers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (100 + 7 * i, 120 - 3 * i, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "data/train/cat/0.png").write_bytes(b"torn")
    data, out = load_dataset(tmp_path / "data", skip_bad_images=True), tmp_path / "run"
    fields = {**TINY, "hidden": 32, "size": 48, "batch_size": 8, "epochs": 2, "holdout": 0.25, "probe_every": 1}
    notes: list[str] = []
    train("co-byol", data, out=out, device="cpu", on_note=notes.append, **fields)
    assert [note for note in notes if "cannot be read" in note] == [
        "1 of 18 images cannot be read and are left out: train/cat/0.png (not an image)"
    ]
    assert load_model(out / "model.safetensors").preprocessing.img_size == 48
    assert [line["step"] for line in log.read(out) if line["kind"] == "train"] == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="size: 224"):
        train("byol", data, out=tmp_path / "other", device="cpu", **{**fields, "size": None})
    assert data.train is not None
    feed = Feed(data.train, 8, torch.device("cpu"), seed=0, views=method_class("byol").views.at(48))
    parts = list(feed.epoch(0))
    assert [len(part.ids) for part in parts] == [8, 8, 8]
    assert sum(len(part.ids.unique()) for part in parts) == 23  # another one stands in for the torn one
    feed.split = replace(data.train, skip_bad_images=False)
    first = next(i for i, part in enumerate(parts) if len(part.ids.unique()) < 8)
    with pytest.raises(CossError, match="cannot be read"):
        list(feed.epoch(0, first))
    rest = list(feed.epoch(0, first + 1))  # what was seen is not read again
    assert [part.ids.tolist() for part in rest] == [part.ids.tolist() for part in parts[first + 1 :]]


PLAIN_SCRIPT = """
import multiprocessing, sys, PIL.Image, coss_eval as ce
print("begins")
multiprocessing.set_start_method(sys.argv[1])
class Mine:
    def __len__(self): return 40
    def __getitem__(self, i): return PIL.Image.new("RGB", (100 + i, 120), (6 * i, 0, 0)), i % 2
if __name__ != "__main__":
    sys.exit("a worker runs the script again")
own = ce.as_dataset(Mine())
geometry = ce.data.batches.Geometry(48)
print(sum(len(batch.ids) for batch in own.train.batches(geometry, workers=2)), "of its own")
fields = {"size": 48, "width": 4, "batch_size": 8, "hidden": 16, "epochs": 1, "warm_up_epochs": 0, "probe_every": 0}
ce.train("byol", ce.load_dataset(sys.argv[2]), out=sys.argv[3], device="cpu", quiet=True, **fields)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_script_without_a_guard_is_run_once_whatever_starts_processes(tmp_path: Path, how: str) -> None:
    """As on macOS, and from Python 3.14 on. Images of a class of the script's own are read by one process."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data" / place).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(pixels[i:]).save(tmp_path / "data" / place / f"{i}.png")
    (tmp_path / "plain.py").write_text(PLAIN_SCRIPT)
    call = [sys.executable, str(tmp_path / "plain.py"), how, str(tmp_path / "data"), str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.stdout.splitlines() == ["begins", "40 of its own", "done"], done.stderr
    assert "images are read by one process" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("byoll", {}, "did you mean"),
        ("byol", {"preset": "cifar-r18"}, "did you mean cifar10-r18"),
        ("byol", {"epoch": 3}, "did you mean epochs"),
        ("byol", {"local_weight": 0.5}, "need the method co-byol"),
        ("simclr", {"accumulate": 2}, "cannot be accumulated"),
        ("byol", {"batch_size": 1}, "two images"),
        ("byol", {"batch_size": 30, "accumulate": 4}, "does not divide"),
        ("byol", {"width": 0}, "width must be a number of at least 1"),
        ("dino", {"small_views": -2}, "small_views must be a number of at least 0"),
        ("dino", {"small_views": 2, "small_predictor": "own"}, "dino has no predictor"),
        ("byol", {"small_predictor": "two"}, "'own' or 'shared', got 'two'"),
        ("byol", {"hidden": 0}, "hidden of byol must be at least 1"),
        ("byol", {"local": {"nonsense": 1}}, "need the method co-byol"),
        ("co-byol", {"site": "global"}, "no locations .* say prepool"),
        ("co-byol", {"sampling": "subset"}, "needs local_grid"),
        ("co-byol", {"local_weight": float("nan")}, "weights must be numbers"),
        ("byol", {"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ("byol", {"momentum": -0.5}, "momentum"),
        ("byol", {"seed": 2**70}, "seed"),
        ("supervised", {"classes": 3}, "is the data's"),
        ("supervised", {"smoothing": 5.0}, "smoothing of supervised must be from 0 to 1"),
        ("simclr", {"temperature": 0.0}, "temperature of simclr must be above 0"),
        ("vicreg", {"variance": -5.0}, "variance of vicreg must be at least 0"),
        ("dino", {"freeze_share": 2.0}, "freeze_share of dino must be from 0 to 1"),
        ("co-byol", {"local": 5}, "local takes fields"),
        ("byol", {"options": 3}, "options takes fields"),
        ("byol", {"arch": "vit_b_16", "stem": "imagenet", "width": 64, "size": 40}, "multiple of its patch"),
        ("byol", {"arch": "rf99_resnet50", "width": 64}, "pass --stem imagenet"),
        ("byol", {"epochs": 3, "warm_up_epochs": 10}, "warm_up_epochs=0"),
        ("co-byol", {"compile": True, "site": "stage2"}, "leave it out"),
        ("byol", {"lr": "fast"}, "expected float"),
        ("byol", {"optimizer": "lar"}, "'lars' or 'sgd' or 'adamw'"),
        ("byol", {"batch_size": 1000}, "96 training images are fewer than a batch of 1000"),
        ("dino", {"arch": "vit_d24_l2_h2_p8", "small_views": 2, "stem": "imagenet", "width": 64}, "takes 32 px only"),
    ],
)
def test_wrong_calls_say_what_to_do(tmp_path: Path, method: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(method, digits(), out=tmp_path, device="cpu", **{**TINY, **overrides})


def test_data_without_a_training_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training split"):
        train("byol", replace(digits(), train=None), out=tmp_path, device="cpu", **TINY)


@pytest.mark.slow
def test_flops_with_small_views_are_those_counted_by_hand() -> None:
    """A 3x3 convolution of stride 2 and a 1x1, 32 px and 16 px views, BYOL's heads; 2 FLOPs a multiplication."""
    fields = {**TINY, **TWO_CONVOLUTIONS, "small_views": 3, "small_size": 16, "options": SMALL["byol"]}
    config = resolve("byol", **fields)
    first, second = ({side: 2 * (side // 2) ** 2 * k for side in (32, 16)} for k in (3 * 8 * 9, 8 * 12))
    projector, predictor = 2 * (12 * 32 + 32 * 20), 2 * (20 * 32 + 32 * 20)
    network = {side: first[side] + second[side] for side in (32, 16)}
    cost = dry_run(config, digits(), device="cpu")
    assert cost.forward == 2 * network[32] + 3 * network[16] + 5 * (projector + predictor)
    assert cost.target == 2 * (network[32] + projector)
    # twice the forward pass, but for the gradient of the pixels, which nobody asks for
    assert cost.backward == 2 * cost.forward - 2 * first[32] - 3 * first[16]
    plain = replace(config, small_views=0)
    found = relative_cost(config, plain, digits(), pairs=3, device="cpu")
    assert found.flops == pytest.approx(cost.flops / dry_run(plain, digits(), device="cpu").flops)
    assert found.low <= found.seconds <= found.high
    assert found.seconds > 1
    assert (found.epochs(1), replace(found, seconds=1.9).epochs(16)) == (1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["co-byol", "simclr", "supervised"])
def test_a_dry_run_costs_two_steps_and_writes_nothing(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = torch.random.get_rng_state()
    cost = dry_run(resolve(method, **{**TINY, **DROPPING}), digits(), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not list(tmp_path.iterdir())
    assert cost.backward > 1.5 * cost.forward > 0
    assert (cost.target > 0) == (method_class(method.removeprefix("co-")).targets == "momentum")
    assert cost.images_per_second > 0
    assert "images/s" in "\n".join(cost.lines())


@pytest.mark.slow
def test_a_dry_run_within_little_memory_tells_that_of_the_run() -> None:
    configs = [resolve("byol", **TINY | HEADS["byol"] | {"batch_size": size}) for size in (32, 96)]
    whole = dry_run(configs[0], digits(), device="cpu")
    found = [dry_run(config, digits(), device="cpu", within=1) for config in configs]
    assert [cost.images for cost in (whole, *found)] == [None, 2, 2]
    assert [cost.steps for cost in found] == [300, 100]
    assert all(cost.flops == pytest.approx(whole.flops, rel=1e-3) for cost in found)
    assert found[1].peak_memory > found[0].peak_memory
    assert "about" in "\n".join(found[0].lines())


@pytest.mark.slow
def test_a_dry_run_of_photographs_needs_little_memory(tmp_path: Path) -> None:
    """A step on 64 images of 224 px would take 5 GB and more; the libraries take most of what this does."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((500, 400))
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(40):
            picture.save(tmp_path / place / f"{i}.jpg")
    fields = ["--arch", "resnet18", "--stem", "imagenet", "--batch-size", "64", "--set", "size=224", "--epochs", "10"]
    call = ["train", "--method", "byol", "--data", str(tmp_path), "--device", "cpu", "--dry-run", *fields]
    script = (
        "import sys\n"
        "from coss_eval.cli import main\n"
        "from coss_eval.runtime.memory import most_resident\n"
        f"sys.argv[1:] = {call!r}\n"
        "try: main()\n"
        "finally: print('PEAK', most_resident() // 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=True)
    assert int(done.stdout.rpartition("PEAK ")[2]) < 1500, done.stdout
    needs = float(done.stdout.partition("memory      about ")[2].partition(" GiB")[0])
    assert 3 < needs < 12
