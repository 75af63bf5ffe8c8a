"""Making representations: self-supervised methods, the CO term around any of them, and the loop that trains them."""

from __future__ import annotations

from importlib import resources


def presets() -> dict[str, str]:
    """Every preset's name with the first line of its file, which says what it is."""
    return _described("presets")


def sweeps() -> dict[str, str]:
    """The sweeps that come with the package, likewise."""
    return _described("sweeps")


def _described(kind: str) -> dict[str, str]:
    folder = resources.files("coss_eval.training").joinpath(kind)
    files = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text().splitlines()[0].lstrip("# ") for name in sorted(files)}
