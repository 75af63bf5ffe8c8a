"""Training curves of several runs side by side, from their logs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coss_eval.errors import UsageError
from coss_eval.reports.drawing import WIDTH, legend, looks, save, style

# what is drawn: (kind of line, value, title, scale)
PANELS = (
    ("probe", "knn", "kNN, held-out training images, %", 100),
    ("probe", "linear", "linear probe, the same images, %", 100),
    ("probe", "effective_rank", "effective rank of the features", 1),
    ("train", "global", "loss, global term (methods' own scales)", 1),
)


@dataclass(frozen=True)
class Curves:
    """One run's log: by (kind, value) the epochs, as fractions, and the values."""

    name: str
    values: dict[tuple[str, str], tuple[list[float], list[float]]]


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """curves.png and curves.pdf of the training runs in ``folders``, each called by its folder's name."""
    runs = [read(folder) for folder in folders]
    with style():
        return save(draw(runs), out / "curves")


def read(folder: Path) -> Curves:
    """The curves in a run's log.jsonl, or in a file of such lines. Raises UsageError where there is none."""
    path = folder / "log.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise UsageError(f"there is no log at {path}; expected the folder of a training run")
    lines = [found for line in path.read_text(errors="replace").splitlines() if (found := _line(line)) is not None]
    values: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for line, epoch in _epochs([line for line in lines if line["kind"] in ("train", "probe")]):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                x, y = values.setdefault((line["kind"], name), ([], []))
                x.append(epoch)
                y.append(value)
    if not values:
        raise UsageError(f"{path} holds no curves yet; let the run finish an epoch")
    return Curves(path.parent.name if path.name == "log.jsonl" else path.stem, values)


def _line(text: str) -> dict[str, Any] | None:
    """A line of a log; None for what a kill has cut, or is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    places = (line.get("step"), line.get("epoch", 0))
    return line if all(isinstance(place, int | float) for place in places) else None


def _epochs(lines: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each line with the epoch at which it was written; probes say where epochs end, and so what a step is."""
    ends = [line["epoch"] / line["step"] for line in lines if line["kind"] == "probe" and line["step"]]
    if not ends:
        ends = [line["epoch"] / line["step"] for line in lines]
    return [(line, line["step"] * ends[-1]) for line in lines]


def draw(runs: Sequence[Curves]) -> Figure:
    """Accuracies, rank and loss over epochs; a panel that no run has values for is left out."""
    shown = [panel for panel in PANELS if any(panel[:2] in run.values for run in runs)]
    look = looks([run.name for run in runs])
    figure = Figure(figsize=(WIDTH, 2.1 * -(-len(shown) // 2) + 0.5), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True)
    for axis, (kind, name, title, scale) in zip(axes.flat, shown, strict=False):
        for run in runs:
            x, y = run.values.get((kind, name), ([], []))
            one = look[run.name]
            marker = one.marker if kind == "probe" else ""
            axis.plot(x, [scale * v for v in y], color=one.color, linestyle=one.dashes, marker=marker, label=run.name)
        axis.set_title(title)
    axes.flat[0].set_xlim(left=0)
    axes.flat[0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("epoch", fontsize="medium")
    legend(figure, look)
    return figure
