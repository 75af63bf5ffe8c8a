"""The command line as a person meets it: quick help, one-line errors, exit codes, resumed runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from coss_eval.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["robustness", "--help"], ["list", "corruptions"]])
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
        (["train", "--data", "digit"], "digits"),
        (["train", "--method", "supervise"], "supervised"),
        (["train", "--arch", "resnet19"], "resnet18"),
        (["attacks", "--eps", "8/x", "--ckpt", "x"], "8/x"),
        (["attacks", "--eps", "8/255,4/255", "--ckpt", "x"], "rising"),
        (["attacks", "--attack", "pgd:l3", "--ckpt", "x"], "pgd:l3"),
        (["corruptions", "--names", "fogg", "--ckpt", "x"], "fog"),
        (["corruptions", "--severities", "6", "--ckpt", "x"], "1 to 5"),
        (["list", "corruption"], "corruptions"),
        (["info", "no/such/thing"], "no/such/thing"),
        (["report", "no/such/folder"], "no/such/folder"),
        (["compare", "no/such/folder", "other"], "no/such/folder"),
        (["robustness", "--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_calls_get_one_line_and_no_traceback(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_config_file_gives_values_and_flags_win(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: nonsense\nckpt: [missing.pth]\n")
    assert "missing.pth" in run("check", "--config", str(config)).stderr
    assert "other.pth" in run("check", "--config", str(config), "--ckpt", "other.pth").stderr
