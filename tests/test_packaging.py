"""What is shipped: one version, declared imports, and a wheel and an sdist that work where there is no checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import coss_eval

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "coss_eval"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place() -> None:
    """The code has it, and the rest reads it there; a citation is a file of its own, and must agree."""
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == coss_eval.__version__


def named(requirements: list[str]) -> set[str]:
    """The distributions of requirements, as importlib.metadata spells them, in lower case."""
    return {re.match(r"[\w.-]+", one)[0].lower().replace("_", "-") for one in requirements}  # type: ignore[index]


def imported(folder: Path) -> set[str]:
    """The top-level modules that a folder's files import, wherever in the code."""
    found = set[str]()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"coss_eval"}


def test_what_is_imported_is_declared() -> None:
    """As a dependency, or as an extra for what the package does without."""
    extras = PROJECT["optional-dependencies"]
    declared = named(PROJECT["dependencies"]) | named([*extras["timm"], *extras["hdf5"], *extras["ray"]])
    declared.add("eagerpy")  # foolbox's own tensors, which its calls take and give
    providers = packages_distributions()
    known = {module: providers.get(module, [module]) for module in imported(PACKAGE)}  # h5py need not be there
    # OpenCV without windows is one and the same module
    names = {module: {name.removesuffix("-headless") for name in named(found)} for module, found in known.items()}
    assert {module: found for module, found in names.items() if not found & declared} == {}


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("foolbox", "eagerpy"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

sys.meta_path.insert(0, Blocked())
sys.modules["imagecorruptions"] = None
import pkgutil, torch, coss_eval as ce
from importlib import import_module
ALONE = {"coss_eval.__main__", "coss_eval.attacks.reference", "coss_eval.corruptions.reference"}
for module in pkgutil.walk_packages(ce.__path__, "coss_eval."):
    import_module(module.name) if module.name not in ALONE else None
images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
pixels, labels = images / 255, torch.tensor([0, 1])
ce.corruptions.corrupt(images, "fog", 3)
ce.attacks.fgsm(network, pixels, labels, 2 / 255)
for needed in (
    lambda: ce.corruptions.corrupt(images, "jpeg_compression", 3),
    lambda: ce.corruptions.corrupt(images, "fog", 3, backend="reference"),
    import_module("coss_eval.corruptions.package").package_folder,
    lambda: ce.attacks.fgsm(network, pixels, labels, 2 / 255, backend="reference"),
    lambda: ce.attacks.Foolbox(attack="LinfDeepFoolAttack"),
):
    try:
        needed()
        print("nothing missed")
    except ce.errors.CossError as error:
        print(error)
"""


def test_what_foolbox_imagecorruptions_and_opencv_are_not_needed_for_works_without_them() -> None:
    """Every module is imported in a process that lacks them; what needs one says in a line what to install."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    expected = ["opencv-python-headless", "opencv-python-headless", "imagecorruptions", "foolbox", "foolbox"]
    assert len(lines) == len(expected), done.stdout
    assert [
        package for package, line in zip(expected, lines, strict=True) if f"pip install {package}" not in line
    ] == []


def test_the_oldest_versions_that_are_tested_are_those_that_are_asked_for() -> None:
    """tests/constraints-oldest.txt has the lower bound of every dependency, so that no bound is a guess."""
    pinned = dict(line.split("==") for line in (ROOT / "tests/constraints-oldest.txt").read_text().splitlines() if line)
    extras = PROJECT["optional-dependencies"]
    bounds = dict(
        one.split(">=") for one in [*PROJECT["dependencies"], *extras["timm"], *extras["hdf5"]] if ">=" in one
    )
    wrong = {
        name: pinned.get(name)
        for name, bound in bounds.items()
        if pinned.get(name, "").split(".")[: bound.count(".") + 1] != bound.split(".")
    }
    assert wrong == {}


def test_every_package_of_the_extra_docs_is_bounded() -> None:
    """A new major version of the site's parts is to be tried first: mkdocs 2 takes no plugins."""
    bounded = [one for one in PROJECT["optional-dependencies"]["docs"] if one.startswith("mkdocs")]
    assert len(bounded) == 3
    assert all("<" in one for one in bounded)


@pytest.fixture(scope="module")
def built(tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel made of it, built from the tracked files alone."""
    pytest.importorskip("build", reason="pip install '.[test]'")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked:
        if path.parts[0] in ("coss_eval", "tests") or len(path.parts) == 1:
            (source / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
    # without isolation, which would fetch setuptools
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return out


def run(*words: str, cwd: Path) -> str:
    """What a program says, run where no checkout is in sight; it must end well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COSS"))}
    clean |= {"COSS_CACHE_DIR": str(cwd / "cache"), "MPLBACKEND": "Agg"}
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Path, tracked: list[Path]) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        inside = {Path(name) for name in file.namelist() if ".dist-info/" not in name}
    assert inside == {path for path in tracked if path.parts[0] == "coss_eval"}


@pytest.mark.slow
def test_the_sdist_holds_the_package_and_how_to_cite_it(built: Path, tracked: list[Path]) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        inside = {Path(*Path(name).parts[1:]) for name in file.getnames()}
    wanted = {Path(name) for name in ("README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml")}
    assert inside >= wanted | {path for path in tracked if path.parts[0] == "coss_eval"}
    assert not any(path.parts[:1] == ("tests",) for path in inside)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_works_outside_the_checkout(kind: str, built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows torch and the other large libraries from this one."""
    (package,) = built.glob(kind)
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = str(tmp_path / "venv/bin/python")
    (place,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (place / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "--quiet")
    run(*pip, "--ignore-installed", "--no-index", str(package), cwd=tmp_path)
    assert str(place) in run(python, "-c", "import coss_eval; print(coss_eval.__file__)", cwd=tmp_path)
    command = str(tmp_path / "venv/bin/coss-eval")
    assert run(command, "--version", cwd=tmp_path).strip() == coss_eval.__version__
    assert "digits-tiny" in run(command, "list", "presets", cwd=tmp_path)
    flags = "--names fog --severities 5 --ckpt pixels:8 --data digits --limit 30 --out out --device cpu --quiet"
    run(command, "corruptions", *flags.split(), cwd=tmp_path)
    assert "raw pixels (8 px)" in (tmp_path / "out/report.md").read_text()
    assert list((tmp_path / "out/figures").glob("*.png"))
