"""The command line as a person meets it: quick help, one-line errors, exit codes, resumed runs."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_files import FILES, save
from PIL import Image

from coss_eval import cli, load_dataset, load_model
from coss_eval.checkpoints.load import make_model, save_model
from coss_eval.cli.app import app
from coss_eval.cli.verify import PUBLISHED, Published, check_published
from coss_eval.errors import UsageError
from coss_eval.tasks.attacks import LINF_EPS


class Done(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Done]:
    """The command line in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["coss-eval", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Done(stop.value.code, *capsys.readouterr())

    return run_


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["robustness", "--help"],
        ["attacks", "--help"],
        ["corruptions", "--help"],
        ["list", "corruptions"],
        ["list", "presets"],
    ],
)
def test_help_and_list_import_neither_torch_nor_pandas(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom coss_eval.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'pandas', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_list_keeps_within_the_terminal(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = run("list", "presets").out
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("list", "presets").out
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert narrow.split() == whole.split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["robustnes"], "robustness"),
        (["robustness", "--foo", "1"], "--foo"),
        (["robustness"], "--ckpt"),
        (["robustness", "--ckpt", "missing.pth"], "missing.pth"),
        (["robustness", "--ckpt", "torchvision:resnet17"], "resnet18"),
        (["check", "--ckpt", "missing.pth"], "missing.pth"),
        (["evaluate", "--tasks", "corruption", "--ckpt", "x"], "corruptions"),
        (["train", "--method", "byol", "--data", "digit"], "digits"),
        (["train", "--method", "co-byo"], "co-byol"),
        (["corruptions", "--ckpt", "pixels:8", "--out", ""], "what follows --out is empty"),
        (["corruptions", "--ckpt", "pixels:8", "--data="], "what follows --data is empty"),
        (["corruptions", "--ckpt", "pixels:8", "--severities", "1", "1"], "each severity once"),
        (["corruptions", "--ckpt", "pixels:8", "--limit", "10", "--names", "fog", "--budget-hours", "nan"], "0 hours"),
        (["probe", "--ckpt", "pixels:8", "--fractions", "2"], "fractions above 0"),
        (["probe", "--ckpt", "pixels:8", "--k", "0"], "k of 1 or more"),
        (["train", "--method", "byol", "--preset", "digit-tiny"], "digits-tiny"),
        (["train", "--method", "byol", "--set", "local_weight=1"], "co-byol"),
        (["train", "--method", "byol", "--set", "epoch=1"], "epochs"),
        (["train", "--method", "byol", "--set", "epochs"], "field=value"),
        (["train", "--method", "byol", "--set", "method=dino"], "give the method as --method"),
        (["train", "--method", "byol", "--set", "lr=[1"], "no YAML value"),
        (["train", "--method", "byol", "--set", "out=no"], "expected int"),
        (["train", "--method", "byol", "--arch", "resnet19"], "resnet18"),
        (["probe", "--epochs", "5", "--ckpt", "x"], "--protocol sgd"),
        (["probe", "--protocol", "sgd", "--lr", "-1", "--ckpt", "x"], "above 0"),
        (["attacks", "--eps", "8/x", "--ckpt", "x"], "8/x"),
        (["attacks", "--eps", "8/255,4/255", "--ckpt", "x"], "rising"),
        (["attacks", "--eps", "8", "--ckpt", "x"], "8/255"),
        (["attacks", "--attack", "pgd:l3", "--ckpt", "x"], "pgd:l3"),
        (["attacks", "--attack", "apdg", "--ckpt", "x"], "apgd"),
        (["attacks", "--attack", "foolbox:LinfDeepFoolAttack", "--ckpt", "x"], "--backend reference"),
        (["attacks", "--step-size", "2/x", "--ckpt", "x"], "2/x"),
        (["attacks", "--target", "representation", "--loss", "dlr", "--ckpt", "x"], "--loss dlr"),
        (["internal", "--kinds", "chanel", "--ckpt", "x"], "channel"),
        (["internal", "--levels", "1.5", "--ckpt", "x"], "[0, 1)"),
        (["corruptions", "--names", "fogg", "--ckpt", "x"], "fog"),
        (["corruptions", "--severities", "6", "--ckpt", "x"], "1 to 5"),
        (["corruptions", "--write", "x", "--clean", "digits"], "clean images of its own"),
        (["corruptions", "--write", "x", "--severities", "1"], "--layout folders"),
        (["corruptions", "--write", "x", "--classes", "absent.txt"], "absent.txt"),
        (["figures", "no/such/folder"], "no/such/folder"),
        (["figures", "gallery", "--image", "absent.jpg"], "absent.jpg"),
        (["figures", ".", "--width", "3.3 parsecs"], "--width such as 3.3in"),
        (["figures", ".", "--width", "330in"], "a width from 2 to 20 inches"),
        (["figures", ".", "--only", "everything"], "unknown figure 'everything'"),
        (["figures", ".", "--models", "nobody"], "unknown model 'nobody'"),
        (["figures", ".", "--format", "gif"], "unknown format 'gif'"),
        (["extract", "--ckpt", "pixels:8", "--sites", "stage1"], "prepool"),
        (["extract", "--format", "npz", "--ckpt", "pixels:8"], "npz"),
        (["similarity", "--measures", "ckaa", "--ckpt", "pixels:8"], "cka"),
        (["similarity", "--ckpt", "pixels:8", "--sites", "global"], "two sites or two models"),
        (["similarity", "--ckpt", "pixels:8", "--recordings", "v4.npz"], "NAME=FILE.npz"),
        (["crops", "--areas", "1.5", "--ckpt", "x"], "at most 1"),
        (["sweep", "crop", "--list"], "crops"),
        (["sweep", "crops-digits", "--job", "9"], "1 to 4"),
        (["list", "corruption"], "corruptions"),
        (["info", "no/such/thing"], "no/such/thing"),
        (["report", "no/such/folder"], "no/such/folder"),
        (["consistency"], "give results folders"),
        (["consistency", "no/such/folder"], "no/such/folder"),
        (["compare", "no/such/folder", "other"], "no/such/folder"),
        (["compare", "no/such/folder"], "B is missing: coss-eval compare A B"),
        (["compare"], "A is missing: coss-eval compare A B"),
        (["train"], "--method is missing: coss-eval train --method METHOD"),
        (["probe", "--ckpt", "x", "--device"], "--device needs a value"),
        (["list", "tasks", "datasets"], "'datasets' is one argument too many"),
        (["report"], "give a results folder, or several for a leaderboard"),
        (["report", "a", "b"], "there is no folder a"),
        (["figures", str(Path(__file__).parent / "attacks")], "there is nothing to draw in"),
        (["report", "a", "--rename", "x"], 'expected --rename "OLD=NEW"'),
        (["report", "a", "--label", "x"], 'expected --label "NAME=PATHS"'),
        (["robustness", "--label", "x=no/such/*.pth"], "matches no file"),
        (["relate"], "give results folders"),
        (["relate", "no/such/folder", "--x", "redundancy"], "no/such/folder"),
        (["robustness", "--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_calls_get_one_line_and_no_traceback(
    run: Callable[..., Done], arguments: list[str], expected: str
) -> None:
    done = run(*arguments)
    assert done.code in (1, 2)
    assert expected in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("evaluate --tasks probe crops --tasks redundancy", "tasks", ("probe", "crops", "redundancy")),
        ("corruptions --names fog frost --limit 5 --names snow", "options.names", ("fog", "frost", "snow")),
        ("corruptions --severities 1 3", "options.severities", (1, 3)),
        ("probe --lr 0.1 0.3 --lr 1 --protocol sgd", "options.lr", (0.1, 0.3, 1.0)),
        ("attacks --eps 1/255 2/255 --eps 0.5,0.6 --limit 5", "options.eps.linf", (1 / 255, 2 / 255, 0.5, 0.6)),
        ("attacks --eps 1/255 --eps-l2 0.1,0.2 --limit 5", "options.eps.l2", (0.1, 0.2)),
        ("attacks --eps-l2 0.1", "options.eps.linf", LINF_EPS),
        ("attacks --attack fgsm:linf pgd:l2", "options.attacks", (("fgsm", "linf"), ("pgd", "l2"))),
        ("internal --kinds noise channel --sites stage1 global", "options.kinds", ("noise", "channel")),
        ("internal --kinds noise channel --sites stage1 global", "options.sites", ("stage1", "global")),
        ("crops --areas 0.2 0.4 --counts 1 2", "options.counts", (1, 2)),
        ("crops --positions centre 'top left'", "options.positions", ("centre", "top left")),
        ("robustness --ckpt a.pth b.pth --quiet --ckpt c.pth", "models.ckpt", ("a.pth", "b.pth", "c.pth")),
        ("receptive-field --ckpt a.pth b.pth --size 64", "model.ckpt", ("a.pth", "b.pth")),
        ("receptive-field --arch a --limit 5", "limit", 5),
        ("receptive-field --arch a --images 5", "limit", 5),
        ("report a b --models 'co-*' byol --models x", "models", ("co-*", "byol", "x")),
        ("compare a b", "b", Path("b")),
        ("relate a b --x redundancy --y 'PGD 2/255'", "folders", (Path("a"), Path("b"))),
        ("relate a b --x redundancy --y 'PGD 2/255'", "y", "PGD 2/255"),
        ("list tasks", "kind", "tasks"),
        ("sweep crops-digits --job 1", "what", "crops-digits"),
        ("figures curves a b --out c", "runs", (Path("a"), Path("b"))),
    ],
)
def test_list_flags_take_several_values_and_may_be_repeated(line: str, name: str, expected: object) -> None:
    _, bound, _ = app.parse_args(shlex.split(line), exit_on_error=False, print_error=False)
    argument, *fields = name.split(".")
    found = bound.arguments[argument]
    for field in fields:
        found = found[field] if isinstance(found, dict) else getattr(found, field)
    assert found == expected


def test_config_file_gives_values_and_flags_win(run: Callable[..., Done], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: nonsense\nckpt: [missing.pth]\n")
    assert "missing.pth" in run("check", "--config", str(config)).err
    assert "other.pth" in run("check", "--config", str(config), "--ckpt", "other.pth").err


def test_a_config_file_keeps_the_lists_of_eps_apart(run: Callable[..., Done], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("ckpt: [pixels:8]\neps-l2: [0.5, 0.1]\neps: [1/255, 2/255]\n")
    assert "got 0.5, 0.1" in run("attacks", "--config", str(config)).err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("data: digits\nmethods: [byol]\nevaluate: [{limit: 5}]\n", "field of evaluate missing: task; add it"),
        ("data: digits\nmethod: [byol]\n", "did you mean methods"),
        ("# claims to come\n", "expected entries such as claims, or data, methods and grid, got an empty file"),
    ],
)
def test_a_sweep_that_lacks_entries_says_which(
    content: str, expected: str, run: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    done = run("sweep", "mine.yaml", "--list")
    assert done.code == 2
    assert expected in done.err
    assert len(done.err.strip().splitlines()) == 1


OWN = """
from dataclasses import dataclass
from coss_eval.attacks import Stepwise

def darker(images, condition, draws):
    return images * (1 - 0.1 * condition.severity)

@dataclass(frozen=True, kw_only=True)
class Signs(Stepwise):
    name = "signs"
    about = "steps of eps / 4 along the gradient's sign"
    norms = ("linf",)
    random = False
    steps: int = 3

    def advance(self, view, memory):
        return self.ball.project(view.pixels + view.eps / 4 * view.gradient.sign(), view.clean, view.eps)
"""


@pytest.mark.slow
def test_a_corruption_and_an_attack_of_ones_own(run: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "own_engines.py").write_text(OWN)
    shared = ["--ckpt", "pixels:8", "--limit", "20", "--out", "out", "--device", "cpu"]
    corrupted = ["corruptions", "--names", "fog", "own_engines:darker", "--severities", "2", *shared]
    assert run(*corrupted, "--quiet").code == 0
    assert "darker" in (tmp_path / "out" / "report.md").read_text()
    assert "of which 0 to compute" in run(*corrupted, "--dry-run").out
    sys.modules.pop("own_engines")
    (tmp_path / "own_engines.py").write_text(OWN.replace("0.1", "0.11"))
    assert "of which 1 to compute: corruptions 1" in run(*corrupted, "--dry-run").out  # fog is the same

    attacked = ["attacks", "--attack", "own_engines:Signs:linf", "--eps", "8/255", "--images", "10", *shared]
    assert run(*attacked, "--quiet").code == 0
    assert "Signs, Linf" in (tmp_path / "out" / "report.md").read_text()
    attacked[2] = "own_engines:Signs"
    assert "of which 0 to compute" in run(*attacked, "--dry-run").out


@pytest.mark.slow
def test_a_first_session_from_training_to_a_comparison(run: Callable[..., Done], tmp_path: Path) -> None:
    recipe = ["--method", "supervised", "--preset", "digits-tiny", "--epochs", "1"]
    assert run("train", *recipe, "--out", "one").code == 0
    assert run("train", *recipe, "--seed", "1", "--out", "two").code == 0

    described = run("info", "one/model.safetensors").out
    assert "resnet18" in described
    assert "(coss-eval)" not in described
    assert "451 images" in run("info", "digits").out
    assert "parameters" in run("info", "one").out
    refused = run("probe", "--ckpt", "one/last.pt")
    assert refused.code in (1, 2)
    assert "give" in refused.err
    assert "model.safetensors" in refused.err
    assert len(refused.err.strip().splitlines()) == 1

    checked = run("check", "--ckpt", "one/model.safetensors")
    assert checked.code == 0, checked.out
    assert all(task in checked.out for task in ("probe", "corruptions", "attacks", "internal", "redundancy"))

    flags = ["--tasks", "corruptions", "--tasks", "redundancy", "--limit", "20"]
    planned = run("evaluate", *flags, "--ckpt", "one/model.safetensors", "--out", "a", "--dry-run").out
    assert "digits: LIMITED to 20 test images, 10 classes" in planned
    assert "geometry    size 32 x 32, resize native" in planned
    assert "checkpoint  one\n" in planned
    assert not Path("a").exists()
    for model, out in (("one", "a"), ("two", "b")):
        done = run("evaluate", *flags, "--ckpt", f"{model}/model.safetensors", "--out", out, "--quiet")
        assert done.code == 0, done.err
        assert "report.md" in done.out
    held = run("info", "a").out
    assert "limit 20" in held
    assert "corruptions one: 20 cells" in held
    assert "corruptions" in run("compare", "a", "b").out
    assert "Cohen's kappa" in run("consistency", "a", "b", "--out", "kappa.csv").out
    assert "3 models or more with both 'redundancy' and 'corrupted', got 2" in run("relate", "a", "b").err
    assert Path("kappa.csv").read_text().startswith("a,b,task,metric,condition,kappa,low,high")
    assert "figures" in run("figures", "a").out
    assert "report.html" in run("report", "a").out


@pytest.mark.slow
def test_co_byol_from_a_preset_to_its_probe(run: Callable[..., Done]) -> None:
    preset = ["--method", "co-byol", "--preset", "digits-tiny", "--epochs", "1", "--set", "local_weight=0.5"]
    assert "GFLOPs" in run("train", *preset, "--dry-run").out
    trained = run("train", *preset, "--out", "co")
    assert trained.code == 0, trained.err
    assert run("train", *preset, "--out", "co", "--resume").code == 0
    assert "curves.png" in run("figures", "curves", "co").out
    other = run("train", *preset, "--out", "co", "--resume", "--lr", "0.7")
    assert other.code != 0
    assert "lr" in other.err
    probed = run("probe", "--ckpt", "co/model.safetensors", "--limit", "50", "--out", "probe", "--quiet")
    assert probed.code == 0, probed.err
    assert "kNN" in probed.out


def test_verify_runs_its_self_checks(run: Callable[..., Done]) -> None:
    done = run("verify")
    assert done.code == 0, done.out
    assert done.out.count("ok  ") == 5
    skipped = [line for line in done.out.splitlines() if line.startswith("skip  ")]
    assert len(skipped) == len(PUBLISHED)
    for network in ("supervised ResNet-50", "DINO", "MoCo v3", "BYOL"):
        assert any(line.startswith(f"skip  {network}") and "give --imagenet FOLDER" in line for line in skipped)
    assert "NAME=FILE" in run("verify", "--ckpt", "dino.pth").err
    assert "did you mean dino-vits" in run("verify", "--ckpt", "dino-vits=dino.pth").err


def test_published_numbers_are_those_of_each_way_to_classify() -> None:
    """kNN and the probe against independent lines; a number that is not the published one is told."""
    digits, pixels = load_dataset("digits"), load_model("pixels:8")
    assert digits.train is not None
    train, test = next(digits.train.batches(batch_size=2000)), next(digits.test.batches(batch_size=2000))
    near, far = (pixels.backbone(pixels.encoder().normalise(b.images / 255)).double().numpy() for b in (train, test))
    near, far = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (near, far))
    right = 0
    for row, label in zip(far @ near.T, test.labels, strict=True):
        nearest = np.argsort(-row)[:20]
        votes = np.bincount(train.labels.numpy()[nearest], np.exp(row[nearest] / 0.07), minlength=10)
        right += int(votes.argmax() == label)
    value = 100 * right / len(far)
    knn = Published("pixels", "raw pixels", "kNN", round(value, 1), "here", 0.06)
    assert check_published(knn, pixels, digits, "cpu")[0]
    assert not check_published(replace(knn, value=value - 1), pixels, digits, "cpu")[0]
    ok, words = check_published(replace(knn, by="linear probe", value=95, tolerance=3), pixels, digits, "cpu")
    assert ok, words
    with pytest.raises(UsageError, match="of a file with its classifier"):
        check_published(replace(knn, by="own head"), replace(pixels, classes=("a", "b")), digits, "cpu")


@pytest.mark.slow
def test_verify_measures_what_is_given_and_says_what_disagrees(run: Callable[..., Done], tmp_path: Path) -> None:
    """A network of random weights has not DINO's accuracy; a file that is not there is one line."""
    draws = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "val"), "ab", range(12)):
        file = tmp_path / "set" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(file)
    save(FILES["DINO, ResNet"]().content, tmp_path / "dino.pth")
    given = ("--ckpt", "dino-resnet50=dino.pth", "--ckpt", "resnet50=missing.pth", "--device", "cpu")
    done = run("verify", "--imagenet", "set", *given)
    assert done.code == 1
    lines = {line[:36].strip(): line for line in done.out.splitlines() if line.startswith("FAIL")}
    assert "n=24, tolerance 0.2" in lines["FAIL  DINO ResNet-50: kNN 67.5 %"]
    assert "n=24, tolerance 1 " in lines["FAIL  DINO ResNet-50: linear probe 7"]
    assert "missing.pth" in lines["FAIL  supervised ResNet-50 V1: own h"]
    assert len(lines) == 3


BRIGHTNESS = """
from torch import nn

class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 1, 1), nn.Linear(1, 10)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def brightness(folder: Path, side: int, framed: bool, mean: float, std: float) -> None:
    """Grey images of ten levels, a black frame around them where ``framed``, and a network that tells which they are.

    It classifies by the nearest level as ``mean`` and ``std`` normalise it, over the whole image, with its frame.
    """
    (folder / "brightness.py").write_text(BRIGHTNESS)
    levels, edge = [0.1 * (level + 1) for level in range(10)], side // 16 if framed else 0
    for level in range(10):
        for number in range(10):
            grey = np.zeros((side, side, 3), np.uint8)
            grey[edge : side - edge, edge : side - edge] = round(255 * levels[level] - number)
            file = folder / "set" / "test" / f"{level}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(file)
    share = (1 - 2 * edge / side) ** 2
    centres = torch.tensor([(share * (level - 4.5 / 255) - mean) / std for level in levels])
    state = {"conv.weight": torch.full((1, 3, 1, 1), 1 / 3), "conv.bias": torch.zeros(1)}
    torch.save(state | {"fc.weight": centres[:, None], "fc.bias": -(centres**2) / 2}, folder / "net.pth")


RECONCILE = ("reconcile", "--ckpt", "net.pth", "--arch", "brightness:Brightness", "--data", "set", "--device", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "framed", "mean", "std", "more", "found"),
    [
        (32, False, 0.5, 0.5, (), "pixels in [-1, 1] (mean .5, std .5) would explain it: --mean 0.5 0.5 0.5"),
        (256, True, 0.449, 0.226, (), "the centre crop keeps 1 of the shorter side would explain it: --crop-pct 1"),
        (256, True, 0.5, 0.5, ("--pairs", "--limit", "20"), "(mean .5, std .5) and the centre crop keeps 1 of"),
    ],
    ids=["normalisation", "crop", "both"],
)
def test_reconcile_finds_what_was_planted(
    run: Callable[..., Done],
    side: int,
    framed: bool,
    mean: float,
    std: float,
    more: tuple[str, ...],
    found: str,
    tmp_path: Path,
) -> None:
    brightness(tmp_path, side, framed, mean, std)
    before = sorted(tmp_path.rglob("*"))
    done = run(*RECONCILE, "--head", "own", "--expected", "99", *more)
    assert done.code == 0, done.out + done.err
    nearest, *_ = [line for line in done.out.splitlines() if line.startswith("found ")]
    assert found in nearest
    assert "A diagnosis, not a score" in done.out
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "__pycache__" not in path.parts]
    assert new == []  # no cells, no report


@pytest.mark.slow
def test_reconcile_tries_the_other_networks_of_a_file_and_both_heads(run: Callable[..., Done], tmp_path: Path) -> None:
    """A probe where there is a head; the file's teacher and student, whose probes then differ."""
    save(FILES["DINO, ResNet"]().content, tmp_path / "dino.pth")
    flags = ("--data", "digits", "--limit", "50", "--train-limit", "200", "--device", "cpu", "--expected", "100")
    tried = run("reconcile", "--ckpt", "dino.pth", *flags).out
    assert "branch      the file's student: " in tried
    assert "channels    channels in the order blue, green, red: not possible" in tried
    save_model(make_model("resnet18", stem="cifar", width=4, classes=list("0123456789")), tmp_path / "own.safetensors")
    assert "head        a linear probe: " in run("reconcile", "--ckpt", "own.safetensors", *flags).out


@pytest.mark.slow
def test_reconcile_says_where_nothing_is_to_be_found(run: Callable[..., Done], tmp_path: Path) -> None:
    brightness(tmp_path, 32, False, 0.5, 0.5)
    right = (*RECONCILE, "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--head", "own")
    assert "no gap to explain" in run(*right, "--expected", "99").out
    missing = run(*right, "--expected", "84")
    assert missing.code == 1
    assert "none of these explains the gap" in missing.out
    assert "--pairs tries two changes at a time" in missing.out
    assert "in percent" in run(*right, "--expected", "0.84").err
    assert "one --ckpt" in run(*right, "--ckpt", "other.pth", "--expected", "84").err


@pytest.mark.slow
def test_receptive_fields_in_theory_and_over_images(run: Callable[..., Done]) -> None:
    done = run("receptive-field", "--arch", "rf29_resnet18", "--size", "64")
    assert done.code == 0
    assert "stage1      64 x 64        1        11" in done.out
    assert "prepool      8 x 8         8        29" in done.out
    done = run("receptive-field", "--arch", "rf9_resnet18", "--width", "8", "--data", "digits", "--limit", "5")
    assert "median over 5 test images of digits" in done.out
    assert "of an image of 32 px" in done.out
    done = run("receptive-field", "--arch", "rf9_resnet18", "--data", "digits", "--images", "3", "--out", "fields")
    assert [Path(line).suffix for line in done.out.splitlines()[-3:]] == [".png", ".pdf", ".npz"]
    with np.load(done.out.splitlines()[-1]) as maps:
        sites = {name: one for name, one in maps.items() if "/" not in name}
        assert set(sites) == {"stage1", "stage2", "stage3", "stage4", "prepool"}
        assert all(one.shape == (32, 32) and one.max() == 1 for one in sites.values())
        assert maps["stage1/n"] == 3
    assert "give --data" in run("receptive-field", "--arch", "rf9_resnet18", "--out", "fields").err
    assert "--arch" in run("receptive-field").err
    assert "32 px" in run("receptive-field", "--arch", "rf9_resnet18", "--data", "digits", "--size", "64").err


NETWORKS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.conv, self.fc, self.gain = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, classes), 1.0

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)) * self.gain)

class Centred(Small):
    def forward(self, x):
        return super().forward(x - x.mean(0))

class Drops(Small):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, training=True))

class Overflows(Small):
    def __init__(self):
        super().__init__()
        self.gain = float("inf")
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Flags for a checkpoint of a network of NETWORKS, on class folders of two classes of 16 px."""
    import numpy as np
    import torch
    from PIL import Image

    (tmp_path / "cli_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_networks", raising=False)
    draw = np.random.default_rng(0)
    for folder in (tmp_path / "set" / split / name for split in ("train", "val") for name in "ab"):
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")

    def flags(name: str = "Small") -> list[str]:
        import cli_networks

        torch.manual_seed(0)
        torch.save(getattr(cli_networks, name)().state_dict(), tmp_path / f"{name}.pth")
        arch = ["--arch", f"cli_networks:{name}", "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
        return ["--ckpt", f"{name}.pth", *arch, "--data", "set", "--out", "out", "--quiet"]

    return flags


def protocols(out: Path = Path("out")) -> list[dict[str, Any]]:
    from coss_eval.store import Store

    return [record["protocol"] for record in Store(out).records()]


@pytest.mark.slow
def test_batch_dependent_networks_need_a_flag(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    call = ["redundancy", *small("Centred"), "--batch-size", "4"]
    refused = run(*call)
    assert refused.code != 0
    assert "--allow-batch-dependent" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    allowed = run(*call, "--allow-batch-dependent")
    assert allowed.code == 0, allowed.err
    assert {protocol["model"]["batch_size"] for protocol in protocols()} == {4}


@pytest.mark.parametrize("network", ["Centred", "Drops"])
def test_check_says_once_why_no_run_would_begin(
    network: str, run: Callable[..., Done], small: Callable[..., list[str]]
) -> None:
    flags = small(network)
    checked = run("check", *flags[: flags.index("--out")])
    assert checked.code == 1
    assert checked.out.count("--allow-batch-dependent") == 1
    assert checked.out.strip().endswith("NOT OK: see the lines above")


@pytest.mark.parametrize("command", ["check --tasks crops", "crops --dry-run"])
def test_cores_that_others_use_are_left_to_them(
    command: str, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads beside a busy program took six times as long as one."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("coss_eval.runtime.device.busy_cores", lambda: 3.0)
    try:
        torch.set_num_threads(4)
        done = run(*command.split(), "--ckpt", "pixels:8", "--data", "digits", "--device", "cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert done.code == 0, done.err
    assert "Other programs are busy here, so this one uses 1 of 4 cores." in done.out


@pytest.mark.slow
def test_exif_is_in_the_protocol(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    for flag in ([], ["--exif"]):
        assert run("redundancy", *small(), *flag).code == 0
    assert [protocol["geometry"].get("exif") for protocol in protocols()].count(True) == len(protocols()) // 2


@pytest.mark.slow
def test_places_named_by_hand_are_used_and_said(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    flags = [flag for flag in small() if flag != "--quiet"]
    done = run("redundancy", *flags, "--local", "conv", "--global", "conv")
    assert done.code == 0, done.err
    assert "conv, as asked" in done.out
    assert all(protocol["model"]["local"] == "conv" for protocol in protocols())
    assert "did you mean conv" in run("redundancy", *small(), "--local", "con").err


@pytest.mark.slow
def test_images_left_out_are_counted_everywhere(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    import json

    for name in ("0", "3"):
        Path(f"set/val/b/{name}.png").write_bytes(b"no image")
    stopped = run("redundancy", *small())
    assert stopped.code == 1
    assert "2 of 12 test images cannot be read" in stopped.err
    assert "--skip-bad-images" in stopped.err
    line = "2 of 12 test images cannot be read and are left out: val/b/0.png (not an image); val/b/3.png (not an image)"
    done = run("redundancy", *small(), "--skip-bad-images")
    assert done.code == 0, done.err
    assert f"LEFT OUT    {line}" in done.out
    assert line in Path("out/report.md").read_text()
    assert [line] in [entry.get("left_out") for entry in json.loads(Path("out/run.json").read_text())["runs"]]


@pytest.mark.slow
def test_what_fails_is_told_and_is_the_exit_code(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    flags, broken = small(), small("Overflows")
    done = run("redundancy", *broken)  # nothing else was measured, and there is no report
    assert done.code == 1
    assert "NOT DONE    redundancy prepool trained of Overflows: " in done.out
    assert "NaN or infinity" in done.out
    done = run("evaluate", "--tasks", "redundancy", "probe", *flags, "--limit", "4")  # goes into the same folder
    assert done.code == 0, done.err
    assert "NOT DONE" not in done.out


def test_robustness_skips_what_the_images_do_not_allow(
    run: Callable[..., Done], small: Callable[..., list[str]]
) -> None:
    import shutil

    shutil.rmtree("set/train")
    tasks = ["--tasks", "probe", "corruptions", "redundancy"]
    done = run("robustness", *small(), *tasks)
    assert done.code == 0, done.err
    assert "SKIPPED     probe of Small: set has no training split" in done.out
    assert "SKIPPED     corruptions of Small: set has no training split" in done.out
    nothing = run("robustness", *small(), "--tasks", "probe")
    assert nothing.code != 0
    assert "nothing can be measured" in nothing.err


@pytest.mark.slow
def test_similarity_writes_its_page(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    import json

    import numpy as np
    import pandas as pd

    from coss_eval.data.open import load_dataset

    units = np.random.default_rng(0).normal(size=(12, 3, 5))
    np.savez("v4.npz", repeats=units[:, :1] + 0.1 * units, ids=np.array(load_dataset("set").test.keys))
    recorded = ("--recordings", "V4=v4.npz", "--measures", "cka")
    done = run("similarity", *small(), "--untrained", "1", "--sites", "prepool", "global", *recorded)
    assert done.code == 0, done.err
    table = pd.read_csv("out/similarity.csv")
    assert len(table) == 10
    assert (table.loc[table["site_b"] == "recordings", "ceiling"] < 1).sum() == 4
    (entry,) = json.loads(Path("out/run.json").read_text())["runs"]
    assert [model["name"].split()[0] for model in entry["models"]] == ["Small", "untrained"]
    assert {"command", "versions", "device", "git_commit", "data"} < set(entry)
    assert Path("out/report.html").stat().st_size > 10_000
    missing = run("similarity", *small(), "--sites", "stage7")
    assert missing.code == 2
    assert "stage7" in missing.err


def test_extract_writes_a_file_a_site(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    import numpy as np

    done = run("extract", *small(), "--sites", "prepool", "global", "--locations", "all")
    assert done.code == 0, done.err
    assert np.load("out/Small/prepool.npy").ndim == 3
    assert np.load("out/Small/global.npy").shape[:2] == (12, 1)
    assert str(Path("out/Small/images.csv")) in done.out


@pytest.mark.slow
def test_heatmaps_are_drawn_and_kept(run: Callable[..., Done], small: Callable[..., list[str]]) -> None:
    import numpy as np

    done = run("heatmaps", *small(), "--images", "3", "--untrained", "1")
    assert done.code == 0, done.err
    with np.load("out/Small.npz") as found:
        assert found["each"].shape[0] == len(found["ids"]) == 3
        assert found["mean"].shape == found["each"].shape[1:]
        assert (np.abs(found["each"]) <= 1 + 1e-5).all()
    assert Path("out/heatmaps.png").stat().st_size > 5_000
    for of in ("1,1", "another", "evidence"):
        assert run("heatmaps", *small(), "--images", "2", "--limit", "8", "--of", of).code == 0, of
    assert "no location 9, 9" in run("heatmaps", *small(), "--of", "9,9").err
    missing = run("heatmaps", *small(), "--site", "global")
    assert missing.code == 2
    assert "no locations" in missing.err
