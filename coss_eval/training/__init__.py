"""Making representations: self-supervised methods, the CO term around any of them, and the loop that trains them."""

from __future__ import annotations

from importlib import resources


def presets() -> dict[str, str]:
    """Every preset's name with the first line of its file, which says what it is."""
    folder = resources.files("coss_eval.training").joinpath("presets")
    files = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text().splitlines()[0].lstrip("# ") for name in sorted(files)}
