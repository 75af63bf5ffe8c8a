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
    declared = named(PROJECT["dependencies"]) | named([*extras["timm"], *extras["hdf5"]])
    declared.add("eagerpy")  # foolbox's own tensors, which its calls take and give
    providers = packages_distributions()
    known = {module: providers.get(module, [module]) for module in imported(PACKAGE)}  # h5py need not be there
    # OpenCV without windows is one and the same module
    names = {module: {name.removesuffix("-headless") for name in named(found)} for module, found in known.items()}
    assert {module: found for module, found in names.items() if not found & declared} == {}


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
