"""Training curves of several runs side by side, from their logs, seeds of one method as a band. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from coss_eval.errors import UsageError
from coss_eval.reports.drawing import KINDS, WHOLE, Canvas, legend, looks, methods_of, panels, save, settle, style
from coss_eval.store.runs import LOG, Runs, run_file

# what is drawn: (kind of line, value, title, scale)
PANELS = (
    ("probe", "knn", "kNN, held-out training images, %", 100),
    ("probe", "linear", "linear probe, the same images, %", 100),
    ("probe", "effective_rank", "effective rank of the features", 1),
    ("train", "global", "loss, global term (methods' own scales)", 1),
)


@dataclass(frozen=True)
class Curves:
    """One run's log: by (kind, value) the epochs, as fractions, and the values.

    ``recipe``: what it was trained with, but for the seed; None where the log does not tell.
    """

    name: str
    values: dict[tuple[str, str], tuple[list[float], list[float]]]
    recipe: str | None = None


def write(folders: Sequence[Path], out: Path, canvas: Canvas = WHOLE, kinds: Sequence[str] = KINDS[:2]) -> list[Path]:
    """curves.png and curves.pdf of the training runs in ``folders``, each called by its folder's name; the paths.

    A folder without a log of its own stands for the runs inside it, as a sweep's does.
    """
    runs = [read(log) for folder in folders for log in logs(folder) or [folder]]
    with style():
        return save(settle(draw(runs, canvas)), out / "curves", kinds)


def logs(folder: Path) -> list[Path]:
    """The runs that have a log: the folder itself, else those inside it, packed or not, but a sweep's pilots."""
    if _has_log(folder):
        return [folder]
    named = [place / name for place in (folder, folder / "training") for name in Runs(place).names()]
    files = sorted(folder.glob("training/*.jsonl"))
    return [run for run in [*named, *files] if not run.name.startswith("pilot-") and _has_log(run)]


def _has_log(run: Path) -> bool:
    if run.is_file():
        return True
    try:
        run_file(run, LOG)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read(folder: Path) -> Curves:
    """The curves in a run's log.jsonl, or in a file of such lines. Raises UsageError where there is none."""
    path = folder if folder.is_file() else folder / LOG
    try:
        text = (path.read_bytes() if path == folder else run_file(folder, LOG)).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no log at {path}; expected the folder of a training run") from error
    lines = [found for line in text.splitlines() if (found := _line(line)) is not None]
    values: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for line, epoch in _epochs([line for line in lines if line["kind"] in ("train", "probe")]):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                x, y = values.setdefault((line["kind"], name), ([], []))
                x.append(epoch)
                y.append(value)
    if not values:
        raise UsageError(f"{path} holds no curves yet; let the run finish an epoch")
    name = path.parent.name if path.name == LOG else path.stem
    return Curves(name, values, _recipe(lines))


def _recipe(lines: Sequence[dict[str, Any]]) -> str | None:
    """A log's own config without its seed, as text."""
    config: dict[str, Any] = next((line["config"] for line in lines if line["kind"] == "start"), {})
    others = {name: value for name, value in config.items() if name != "seed"}
    return json.dumps(others, sort_keys=True) if "seed" in config else None


def by_method(runs: Sequence[Curves]) -> dict[str, list[Curves]]:
    """Runs of one recipe together, called by what their names share; every other run by itself."""
    together: dict[str, list[Curves]] = {}
    for number, run in enumerate(runs):
        together.setdefault(run.recipe or f"run {number}", []).append(run)
    first = [seeds[0].name for seeds in together.values()]
    names = methods_of(first, {})
    return {
        f"{names[name]} ({len(seeds)} seeds)" if len(seeds) > 1 else name: seeds
        for name, seeds in zip(first, together.values(), strict=True)
    }


def _line(text: str) -> dict[str, Any] | None:
    """A line of a log; None for what a kill has cut, or is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    places = (line.get("step", 0), line.get("epoch", 0))
    return line if all(isinstance(place, int | float) for place in places) else None


def _epochs(lines: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each line with the epoch at which it was written; probes say where epochs end, and so what a step is."""
    ends = [line["epoch"] / line["step"] for line in lines if line["kind"] == "probe" and line["step"]]
    if not ends:
        ends = [line["epoch"] / line["step"] for line in lines]
    return [(line, line["step"] * ends[-1]) for line in lines]


def draw(runs: Sequence[Curves], canvas: Canvas = WHOLE) -> Figure:
    """Accuracies, rank and loss over epochs; a panel that no run has values for is left out.

    Seeds of one method are their mean, with a band from the lowest to the highest.
    """
    shown = [panel for panel in PANELS if any(panel[:2] in run.values for run in runs)]
    groups = by_method(runs)
    methods = methods_of(
        [*groups], {name: name.rpartition(" (")[0] for name, seeds in groups.items() if len(seeds) > 1}
    )
    found = looks(methods.values())
    look = {name: found[method] for name, method in methods.items()}
    figure, axes = panels(len(shown), width=canvas.inches(), height=1.9, least=1.45, most=2, alike=False)
    for axis, (kind, name, title, scale) in zip(axes, shown, strict=True):
        for group, seeds in groups.items():
            one = look[group]
            x, values = _seeds([run.values[kind, name] for run in seeds if (kind, name) in run.values])
            if len(values) > 1:
                axis.fill_between(x, scale * values.min(0), scale * values.max(0), color=one.color, alpha=0.16, lw=0)
            y = scale * values.mean(0) if len(values) else []
            axis.plot(x, y, color=one.color, linestyle=one.dashes, marker=one.marker if kind == "probe" else "")
        axis.set_title(title)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.supxlabel(
        "epoch" + (" (bands: lowest to highest seed)" if len(groups) < len(runs) else ""), fontsize="medium"
    )
    legend(figure, look)
    return figure


def _seeds(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The epochs (E,) that all seeds have reached, and each seed's values there (S, E), between its own by lines."""
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    at = np.array(sorted({e for x, _ in curves for e in x if first <= e <= last}))
    return at, np.array([np.interp(at, x, y) for x, y in curves])
