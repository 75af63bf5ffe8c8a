"""Figures at the width they are printed: sizes, looks, names that do not overprint, and what can be asked for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axis import Tick
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from synthetic_runs import IMAGES, Writer

import coss_eval as ce
from coss_eval import corruptions
from coss_eval.cli import main
from coss_eval.errors import UsageError
from coss_eval.evaluation.run import Run
from coss_eval.reports import figures, sweeps
from coss_eval.reports.differences import difference_map, forest
from coss_eval.reports.drawing import GREY, MANY, Canvas, Figure, looks, looks_in, methods_of, rising, save, style
from coss_eval.reports.estimates import Estimate
from coss_eval.reports.gallery import GAP, HEAD, LABELS, MARGIN, attacked, draw_attacked, gallery, read_photograph
from coss_eval.reports.layout import Number, Row
from coss_eval.reports.results import Results
from coss_eval.statistics import Difference
from coss_eval.store import Cell, Measurement, Store

COLUMN = 3.3  # inches: a column of a two-column page


def texts(figure: Figure) -> list[Text]:
    """What is written in a figure, once it is drawn."""
    figure.draw_without_rendering()
    hidden = {id(text) for axis in figure.axes if not axis.get_visible() for text in axis.findobj(Text)}
    hidden |= {id(text) for tick in _undrawn(figure) for text in tick.findobj(Text)}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and id(text) not in hidden]


def _undrawn(figure: Figure) -> Iterator[Tick]:
    """Ticks beyond the ends of their axes."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        yield from (tick for tick in ticks if not low - slack <= tick.get_loc() <= high + slack)


def check(figure: Figure, width: float) -> None:
    """Printed as wide as asked for, with no text below 6 pt, beyond the edge or upon another."""
    assert figure.get_figwidth() == pytest.approx(width)
    found = texts(figure)
    assert min(text.get_fontsize() for text in found) >= 6
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    edge = figure.bbox.padded(1.0)
    for name, box in boxes:
        assert (edge.x0 <= box.x0, edge.y0 <= box.y0, box.x1 <= edge.x1, box.y1 <= edge.y1) == (True,) * 4, name
    crossing = [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.padded(-0.5).overlaps(other)]
    assert crossing == []


@pytest.mark.parametrize("width", [COLUMN, 7.0])
def test_a_forest_plot_says_what_stands(width: float) -> None:
    long = "an untrained rf_resnet18_k4-4-1-0_mlp2x512 with a long name (seed 0)"
    rows = [
        Row("co-byol", [Number(0.032, 0.010, 0.054, p=0.012, signed=True)], "corrupted"),
        Row(long, [Number(-0.2, -0.25, -0.15, p=0.0001, signed=True)], "corrupted"),
        Row("dino", [Number(0.01, -0.02, 0.04, p=0.4, signed=True)], "kept"),
        Row("simclr", [Number(0.01, signed=True)], "kept"),
        Row("not measured", [None], "kept"),
        Row("co-byol", [Number(-0.04, -0.05, -0.03, "plain", p=0.01, signed=True)], "redundancy"),
    ]
    figure = forest(rows, width=width)
    check(figure, width)
    for axis, shown in zip(figure.axes, ([3.2, -20, 1, 1], [-0.04]), strict=True):
        lines = [line for line in axis.lines if line.get_marker() == "o"]  # one for all marks of one fill and edge
        marks = {float(x): line.get_color() for line in lines for x in np.asarray(line.get_xdata())}
        assert sorted(np.concatenate([np.asarray(line.get_xdata()) for line in lines])) == pytest.approx(sorted(shown))
        assert [marks[x] != "white" for x in marks] == [abs(x - 1) > 1e-9 for x in marks]
        order = sorted((float(y), float(x)) for line in lines for x, y in np.asarray(line.get_xydata()))
        assert [x for _, x in order] == pytest.approx(shown)  # rows stand in the order given
    assert "+3.2 [+1.0, +5.4]" in " ".join(text.get_text() for text in texts(figure))


def test_a_forest_plot_of_nothing_is_one_line() -> None:
    with pytest.raises(UsageError, match="none of these rows has one"):
        forest([Row("a", [None])])


def redundancy_by_distance(writer: Writer) -> None:
    """Similarities that fall with the distance, trained and untrained."""
    for weights, at_one in (("trained", 0.6), ("untrained", 0.3)):
        condition = {"site": "prepool", "weights": weights}
        values = {d: at_one / d for d in range(1, 8)}
        name = "within_per_position_at_distance"
        writer.put(
            Cell("redundancy", {**condition, "distances": 7}),
            [Measurement(f"{name}_{d}", v, IMAGES, v - 0.02, v + 0.02, condition) for d, v in values.items()],
        )


NAMES = ("co-byol", "byol", "rf_resnet18_k4-4-1-0_mlp2x512_v1 (seed 0)")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three models with every task."""
    store = Store(tmp_path_factory.mktemp("three") / "run")
    for skill, name in enumerate(NAMES):
        redundancy_by_distance(Writer(store, name, 0.4 * skill).everything())
    return store


@pytest.fixture(scope="module", params=[12, pytest.param(56, marks=pytest.mark.slow)])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """As many models, with a corruption and redundancy."""
    store = Store(tmp_path_factory.mktemp("many") / "run")
    for number in range(request.param):
        writer = Writer(store, f"a resnet of kind {number}", 1 - 0.03 * number)
        writer.corruptions(["fog"])
        redundancy_by_distance(writer)
    return store


DRAWN = [
    pytest.param("corruptions_by_severity", marks=pytest.mark.slow),
    "corruptions_mean",
    "corruptions_differences",
    "attacks_by_eps",
    "internal_by_level",
    "redundancy",
    "redundancy_distance",
    "forest",
    "redundancy_robustness",
]


@pytest.mark.parametrize("width", [COLUMN, 6.875])
@pytest.mark.parametrize("name", DRAWN)
def test_text_is_large_enough_and_apart_at_the_printed_width(three: Store, name: str, width: float) -> None:
    check(figures.draw(Results(three), name, Canvas(width)), width)


@pytest.mark.parametrize(
    "name", ["corruptions_by_severity", "corruptions_differences", "redundancy_distance", "forest"]
)
def test_many_models_are_legible_or_said_to_be_too_many(many: Store, name: str) -> None:
    results = Results(many)
    figure = figures.draw(results, name, Canvas(COLUMN, baseline=results.labels[3]))
    check(figure, COLUMN)
    shown = " ".join(text.get_text() for text in texts(figure)).replace("\n", " ")
    if name == "corruptions_differences":
        assert all(label in shown for label in results.labels)
    elif name != "forest" and len(results.labels) > MANY:
        assert f"the other {len(results.labels) - MANY} of {len(results.labels)}, too many to tell apart" in shown
        assert results.labels[3] in shown


def test_a_look_belongs_to_the_method_whatever_is_shown(three: Store) -> None:
    results = Results(three)
    whole = looks_in(results, "corruptions")
    part = looks_in(results, "corruptions", Canvas(labels=("byol",)))
    assert part == {"byol": whole["byol"]}
    with style():
        assert looks(["x", *NAMES]) == looks([*reversed(NAMES), "x"])
        assert looks(["byol"])["byol"] == looks(["dino", "co-dino", "byol", "co-byol"])["byol"]
        own = looks(["byol", "co-byol", "dino", "co-dino", "simclr", "co-simclr", "supervised"]).values()
        fifty_six = looks([f"m{i}" for i in range(56)])
    for part_of_look in zip(*own, strict=True):  # colours, markers, line styles: for a grey print as well
        assert len(set(part_of_look)) in (7, 1)  # and all are named
    assert len(set(fifty_six.values())) == 56


def test_one_seed_of_a_method_looks_like_the_method() -> None:
    assert methods_of(["byol-seed=0", "co-byol (3 seeds)"], {"co-byol (3 seeds)": "co-byol"}) == {
        "byol-seed=0": "byol",
        "co-byol (3 seeds)": "co-byol",
    }
    assert methods_of(["byol-seed=0", "byol-seed=1"], {}) == {
        "byol-seed=0": "byol-seed=0",
        "byol-seed=1": "byol-seed=1",
    }


def test_untrained_networks_are_grey_in_every_figure(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record_run({"models": [{"name": "r18", "layout": "untrained"}, {"name": "byol", "layout": "coss-eval"}]})
    for name in ("r18", "byol"):
        Writer(store, name, 0.5).corruptions(["fog"])
    assert {label: look.color == GREY for label, look in looks_in(Results(store), "corruptions").items()} == {
        "r18": True,
        "byol": False,
    }


def test_chance_is_drawn(three: Store) -> None:
    for name in ("corruptions_mean", "attacks_by_eps"):
        figure = figures.draw(Results(three), name)
        lines = [line for axis in figure.axes for line in axis.lines if line.get_gid() == "chance"]
        assert len(lines) == sum(axis.get_visible() for axis in figure.axes), name


def test_the_heat_map_has_the_tables_differences(three: Store) -> None:
    results = Results(three)
    figure = figures.draw(results, "corruptions_differences", Canvas(baseline="byol"))
    values = np.asarray(figure.axes[0].images[0].get_array())
    expected = [
        100 * (results.estimate(label, "corruptions", "accuracy", corruption="clean", severity=0).value
               - results.estimate("byol", "corruptions", "accuracy", corruption="clean", severity=0).value)
        for label in (NAMES[0], NAMES[2])
    ]  # fmt: skip
    assert values[0] == pytest.approx(expected)
    assert [label.get_text().replace("\n", "") for label in figure.axes[0].get_xticklabels()] == [NAMES[0], NAMES[2]]


def test_numbers_in_a_heat_map_stand_out_from_their_squares() -> None:
    """By WCAG's contrast of large text, 3: on every shade from orange to purple."""
    values = np.linspace(-0.3, 0.3, 40)
    found = [[Difference(v, v - 0.01, v + 0.01, 0.0, 100)] for v in values]
    with style():
        axis = difference_map([f"row {i}" for i in range(40)], ["model"], found, width=None, quantity="points").axes[0]
    (image,) = axis.images

    def light(color: Any) -> float:
        channels = np.array(to_rgb(color))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for cell, value in zip(axis.texts, values, strict=True):
        dark, bright = sorted([light(cell.get_color()), light(image.to_rgba(100 * value)[:3])])
        assert (bright + 0.05) / (dark + 0.05) > 3, value


def test_fonts_are_embedded_as_true_type(three: Store, tmp_path: Path) -> None:
    figure = figures.draw(Results(three), "redundancy_distance", Canvas(COLUMN))
    with style():
        pdf, svg, png = save(figure, tmp_path / "figure", ("pdf", "svg", "png"))
    content = pdf.read_bytes()
    assert b"/Type0" in content or b"/TrueType" in content
    assert b"/Type3" not in content
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", content)
    assert box is not None
    assert float(box[1]) == pytest.approx(72 * COLUMN, abs=0.5)
    assert svg.read_text().count("<svg") == 1
    assert png.stat().st_size > 0


def test_a_run_plots_one_figure(three: Store) -> None:
    figure = Run(three.path).plot("corruptions_mean", width=COLUMN, models=["byol", "co-byol"])
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")  # a notebook shows it, pyplot or not
    assert figure.get_figwidth() == COLUMN
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"byol", "co-byol"}


def test_unknown_names_list_those_that_there_are(three: Store) -> None:
    results = Results(three)
    with pytest.raises(UsageError, match=r"unknown figure 'corruption_mean'.*corruptions_mean"):
        figures.draw(results, "corruption_mean")
    with pytest.raises(UsageError, match=r"known: (?!.*receptive_fields).*forest"):  # nothing that it cannot draw
        figures.draw(results, "nosuch")
    with pytest.raises(UsageError, match=r"lacks what receptive_fields is drawn from; it has corr"):
        figures.draw(results, "receptive_fields")
    with pytest.raises(UsageError, match="unknown format 'gif'"):
        figures.write(results, three.path / "none", kinds=["gif"])
    with pytest.raises(UsageError, match="unknown model 'nobody'"):
        figures.canvas_of(results, models=["nobody"])
    with pytest.raises(UsageError, match="a width from 2 to 20 inches"):
        figures.canvas_of(results, width=330)


def test_a_sweep_is_drawn_from_its_folder_with_bands_over_seeds(tmp_path: Path) -> None:
    scores = {"top1": Estimate(0.5, 0.45, 0.55, 100), "knn_top1": Estimate(0.4, 0.35, 0.45, 100)}
    runs = [(m, c, seed) for m in ("byol", "co-byol") for c in (0.08, 0.2, 0.5) for seed in range(3)]
    trials = [
        sweeps.Trial(
            number, "x", m, {"crop_min_scale": c}, seed, "done",
            {name: replace(e, value=e.value + 0.01 * seed - 0.1 * c) for name, e in scores.items()},
        )
        for number, (m, c, seed) in enumerate(runs)
    ]  # fmt: skip
    sweeps.write(trials, tmp_path, title="Sweep", about=[])
    assert sweeps.stored(tmp_path) == trials
    figure = figures.draw(Results(Store(tmp_path)), "sweep", Canvas(COLUMN))
    check(figure, COLUMN)
    first = sweeps.summary(trials[:3], "top1")
    assert first is not None
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]  # type: ignore[index]
    assert first.low is not None
    assert np.isclose(band, 100 * first.low).any()


def test_seeds_of_one_recipe_are_a_band(tmp_path: Path) -> None:
    for method in ("byol", "co-byol"):
        for seed in range(3 if method == "byol" else 1):
            folder = tmp_path / f"{method}-seed={seed}"
            folder.mkdir()
            lines: list[dict[str, object]] = [{"kind": "start", "config": {"method": method, "seed": seed}}]
            lines += [
                {"kind": "probe", "step": s, "epoch": s, "knn": 0.1 * s + 0.02 * seed} for s in range(1, 5 + seed)
            ]
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = figures.draw(Results(Store(tmp_path)), "training_curves", Canvas(COLUMN))
    check(figure, COLUMN)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["byol (3 seeds)", "co-byol-seed=0"]
    byol = figure.axes[0].lines[0]
    assert np.asarray(byol.get_xdata()).tolist() == [1, 2, 3, 4]  # where all seeds are
    assert np.asarray(byol.get_ydata()) == pytest.approx([12, 22, 32, 42])
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]  # type: ignore[index]
    assert (band.min(), band.max()) == pytest.approx((10, 44))


def test_receptive_fields_that_lie_in_a_folder_are_drawn_together(tmp_path: Path) -> None:
    peak = np.zeros((32, 32))
    peak[12:20, 12:20] = 1.0
    for name in NAMES:
        sites = {f"stage{i}": peak for i in range(1, 5)}
        more = {f"{site}/size": 8.0 for site in sites} | {f"{site}/n": 4 for site in sites}
        boxes = {"stage1/box": np.array([10, 21, 10, 21])}
        np.savez(tmp_path / f"receptive_fields_{name}.npz", **sites, **more, **boxes)  # type: ignore[arg-type]
    figure = figures.draw(Results(Store(tmp_path)), "receptive_fields", Canvas(COLUMN))
    check(figure, COLUMN)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == len(NAMES) * 4
    assert sum(len(axis.patches) for axis in shown) == len(NAMES)


@pytest.mark.parametrize("width", [COLUMN, 7.0])
def test_attacked_images_are_named_and_what_has_changed_is_bold(width: float) -> None:
    names = "a class whose name is long, such as sulphur-crested cockatoo", "cat"
    found = attacked(
        ce.load_model("pixels:8", mean=(0, 0, 0), std=(1, 1, 1)),
        ce.load_dataset("digits"),
        eps=(0.05, 0.4),
        images=2,
        device="cpu",
    )
    change = np.abs(found.adversarial - found.images).max(axis=(2, 3, 4))  # of each eps and image
    assert (change <= np.array([[0.05], [0.4]]) + 1e-5).all()
    assert (change > 0).all()
    assert any(seen != truth for seen, truth in zip(found.seen[1], found.truth, strict=True))
    long = replace(found, truth=names, seen=(names, names[::-1]))
    figure = draw_attacked(long, width=width)
    check(figure, width)
    bold = [axis.xaxis.label.get_fontweight() == "bold" for axis in figure.axes]
    assert bold == [False, False, True, False] * 2


def test_the_command_draws_what_is_asked_for(
    three: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--only corruptions_mean,redundancy_distance --width 84mm --format pdf,svg --models byol co-byol"
    call = f"coss-eval figures {three.path} {flags} --baseline byol --out {tmp_path}"
    monkeypatch.setattr("sys.argv", call.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    names = [f"{name}.{kind}" for name in ("corruptions_mean", "redundancy_distance") for kind in ("pdf", "svg")]
    assert [Path(line).name for line in capsys.readouterr().out.split()] == names
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", (tmp_path / names[0]).read_bytes())
    assert box is not None
    assert float(box[1]) == pytest.approx(84 / 25.4 * 72, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crops", "internal_by_level", "attacks_by_eps", "redundancy"])
def test_figures_of_committed_results_fit_a_column(name: str) -> None:
    folder = Path(__file__).parents[2] / "results" / "tiny-imagenet-50-supervised"
    check(figures.draw(Results(Store(folder)), name, Canvas(COLUMN)), COLUMN)


def test_names_are_moved_by_no_more_than_they_must() -> None:
    """As scikit-learn's isotonic regression, which takes a second to import."""
    from sklearn.isotonic import isotonic_regression

    for size in (1, 2, 9):
        values = np.random.default_rng(size).normal(size=size)
        assert rising(values) == pytest.approx(isotonic_regression(values))


@pytest.mark.slow
def test_thumbnails_are_the_corrupted_photograph(tmp_path: Path) -> None:
    page = np.asarray(Image.open(gallery(tmp_path)))
    thumb = (page.shape[0] - HEAD - MARGIN) // len(corruptions.NAMES) - GAP
    photograph, ids = read_photograph(None), torch.zeros(1, dtype=torch.int64)
    for name, severity in (("gaussian_noise", 1), ("saturate", 5), ("fog", 3)):
        top, left = (
            HEAD + corruptions.NAMES.index(name) * (thumb + GAP),
            MARGIN + LABELS + (severity - 1) * (thumb + GAP),
        )
        shown = page[top : top + thumb, left : left + thumb].astype(float)
        expected = corruptions.corrupt(photograph, name, severity, ids, table="imagenet")[0].permute(1, 2, 0).numpy()
        assert np.abs(shown.mean((0, 1)) - expected.mean((0, 1))).max() < 1


def test_what_is_no_photograph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    for file in (tmp_path / "notes.txt", tmp_path / "absent.jpg"):
        with pytest.raises(UsageError, match=r"cannot read .* as an image"):
            gallery(tmp_path, image=file)
