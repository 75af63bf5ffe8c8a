"""What `coss-eval list`, `info` and `receptive-field` say; listing imports neither torch nor pandas."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coss_eval.errors import UsageError, unknown_name
from coss_eval.store import Store
from coss_eval.store.runs import RESULTS, Runs

if TYPE_CHECKING:
    from coss_eval.data.split import Split
    from coss_eval.models.model import Model


ARCHITECTURES = {
    "resnet18": "any torchvision classification network by its name; --stem cifar, --width",
    "rf29_resnet18": "RF-ResNet with a receptive field of 29 pixels (64 px images)",
    "rf99_resnet50": "RF-ResNet with a receptive field of 99 pixels (224 px images)",
    "timm:NAME": "any timm network (pip install 'coss-eval[timm]')",
    "package.module:factory": "a network of your own",
}
RUN_FILES = {
    "report.md": "the report",
    "report.html": "the report, with its figures",
    "tables": "CSV and LaTeX",
    "figures": "PDF and PNG",
    "log.jsonl": "a training's log",
    "model.safetensors": "the network that it trained",
}
OTHER_METHODS = {
    "co-NAME": "any of these that compares two views, with the CO term beside it (arXiv 2501.02860)",
    "package.module:Class": "a method of your own",
}


def list_lines(kind: str | None = None) -> list[str]:
    """All names of a kind (tasks, datasets, corruptions, attacks, architectures, methods, ...), or of all."""
    from coss_eval import tasks
    from coss_eval.attacks import names as attacks
    from coss_eval.checkpoints.layouts import LAYOUTS
    from coss_eval.corruptions.names import NAMES
    from coss_eval.corruptions.registry import CORRUPTIONS
    from coss_eval.data import layouts as data_layouts
    from coss_eval.data.open import names
    from coss_eval.sweeps import shipped
    from coss_eval.training import presets
    from coss_eval.training.methods import METHODS

    kinds = {
        "tasks": {name: entry.about for name, entry in tasks.entries().items()},
        "datasets": names(),
        "corruptions": {name: str(CORRUPTIONS[name].set) for name in (*NAMES, *CORRUPTIONS)}
        | {"package.module:function": "a corruption of your own"},
        "attacks": attacks.list_lines(),
        "architectures": ARCHITECTURES,
        "methods": METHODS | OTHER_METHODS,
        "layouts": {layout.name: layout.source for layout in LAYOUTS},
        "data-layouts": {layout.name: layout.about for layout in data_layouts.LAYOUTS},
        "presets": presets(),
        "sweeps": shipped(),
    }
    if kind is not None and kind not in kinds:
        raise unknown_name("kind of list", kind, kinds)
    lines = []
    for title, entries in kinds.items():
        if kind in (None, title):
            width = max(map(len, entries), default=0)
            lines += [title, *(f"  {name:<{width}}  {about}".rstrip() for name, about in entries.items())]
    return lines


def describe(what: str, *, data_root: Path | None = None, arch: str | None = None) -> list[str]:
    """Lines on a results folder (what it holds, provenance), a dataset (sizes, fingerprint) or a checkpoint (keys)."""
    path = Path(what)
    if (path / "run.json").is_file() or Store(path).runs():
        return _run_lines(path)
    if path.is_dir() and (names := (there := Runs(path)).names()):
        lines = [_job_line(there, name) for name in names]
        return [f"sweep       {path}: {len(names)} runs; give the folder of one, or its results/", *lines]
    from coss_eval.checkpoints.files import CHECKPOINTS
    from coss_eval.data.formats.arrays import holds_images
    from coss_eval.data.layouts import recognise

    if path.suffix == ".npz" and path.is_file() and arch is None and holds_images(path):
        return _data_lines(what, data_root)
    if path.is_file() or what.startswith(("torchvision:", "timm:")) or (path / "model.safetensors").is_file():
        return _model_lines(what, arch)
    if path.is_dir() and recognise(path) is None and any(file.suffix in CHECKPOINTS for file in path.iterdir()):
        return _model_lines(what, arch)
    if path.exists() or "/" not in what:
        return _data_lines(what, data_root)
    raise UsageError(f"{what}: neither a checkpoint file, a results folder nor a dataset; check the path")


def field_lines(
    model: Model, *, size: int | None = None, data: str | None = None, data_root: Path | None = None, images: int = 64
) -> list[str]:
    """A table of receptive fields by site, in pixels of an image of ``size`` (by default that of the data, or 224)."""

    from coss_eval.data.open import load_dataset
    from coss_eval.models.classifier import to_float
    from coss_eval.receptive_field.effective import EFFECTIVE_LEVEL
    from coss_eval.receptive_field.theoretical import by_site

    batches = []
    if data is not None:
        test = load_dataset(data, root=data_root).test.limited(images, seed=0)
        images, classifier = len(test), model.encoder()
        geometry = model.preprocessing.geometry
        batches = [classifier.normalise(to_float(batch.images)) for batch in test.batches(geometry, batch_size=32)]
        seen = batches[0].shape[-1]
        if size not in (None, seen):
            raise UsageError(f"the images of {data} reach the network at {seen} px: leave --size {size} out")
        size = seen
    size = (model.preprocessing.img_size or 224) if size is None else size
    lines = [f"{model.name}: receptive fields in pixels of an image of {size} px", ""]
    heads = f"{'site':<10}{'grid':>10}{'jump':>8}{'theory':>10}{'covered':>10}"
    lines.append(heads + (f"{'effective':>12}" if batches else ""))
    for row in by_site(model.backbone, size, batches).to_dict("records"):
        grid, jump, theory = (
            "?" if row[name] != row[name] else "all" if row[name] == float("inf") else f"{row[name]:g}"
            for name in ("grid", "jump", "rf")
        )
        covered = "?" if row["covered"] != row["covered"] else f"{100 * row['covered']:.0f} %"
        measured = f"{row['effective']:>12.1f}" if batches else ""
        lines.append(f"{row['site']:<10}{grid:>4} x {grid:<3}{jump:>8}{theory:>10}{covered:>10}{measured}")
    lines.append("\ncovered: the share of the image's pixels that lie in the theoretical field of some location")
    if batches:
        level = f"pixels above {100 * EFFECTIVE_LEVEL:g} % of the gradient's peak (Luo et al. 2016: of its centre)"
        lines.append(f"effective: the median over {images} test images of {data}; {level}")
    return lines


def write_field_pictures(
    model: Model, *, data: str, data_root: Path | None = None, images: int = 64, out: Path
) -> list[Path]:
    """Each site's effective field over test images as PNG and PDF, with its theoretical box, and as arrays; the paths.

    The arrays (NAME.npz) are maps (H, W) by site, each with a peak of 1; beside them SITE/size, SITE/n and, where the
    theoretical field is less than the image, SITE/box. ``coss-eval figures`` draws those of a folder together.
    """
    import numpy as np

    from coss_eval.data.open import load_dataset
    from coss_eval.receptive_field import draw, field_map
    from coss_eval.reports.drawing import Figure, save, style
    from coss_eval.reports.files import write_file

    test = load_dataset(data, root=data_root).test.limited(images, seed=0)
    sites = {site.module: name for name, site in model.backbone.sites.items() if site.layout != "nc"}
    maps = [field_map(model, test, site=name) for name in sites.values()]
    with style():
        figure = Figure(figsize=(1.8 * len(maps), 2.1), layout="constrained")
        for axis, seen in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
            draw(seen, axis).set_title(f"{seen.site}: {seen.size:.0f} px")
        stem = out / f"receptive_fields_{model.name}".replace("/", "-")
        paths = save(figure, stem)
    buffer, arrays = io.BytesIO(), dict[str, Any]()
    for seen in maps:
        arrays |= {seen.site: seen.map, f"{seen.site}/size": seen.size, f"{seen.site}/n": seen.n}
        arrays |= {} if seen.box is None else {f"{seen.site}/box": np.array(seen.box)}
    np.savez(buffer, **arrays)
    return [*paths, write_file(stem.with_name(f"{stem.name}.npz"), buffer.getvalue())]


def _run_lines(path: Path) -> list[str]:
    store = Store(path)
    records = store.records()
    lines = [f"results     {path}: {_cells(len(records))}"]
    finished = {record["key"] for record in records}
    held = Counter((record["task"], record["model"]) for record in records)
    planned = {cell["key"]: (cell["task"], cell["model"]) for run in store.runs() for cell in run.get("cells", ())}
    gaps = Counter(place for key, place in planned.items() if key not in finished)
    for task, model in sorted({*held, *gaps}):
        missing = f", {gaps[task, model]} missing: the same command computes them" if gaps[task, model] else ""
        lines.append(f"{task:<12}{model}: {_cells(held[task, model])}{missing}")
    if others := sorted(file.name for file in path.glob("*") if file.name in RUN_FILES):
        lines.append(f"files       {', '.join(f'{name} ({RUN_FILES[name]})' for name in others)}")
    for run in store.runs():
        try:
            lines += _made_by(run)
        except (KeyError, TypeError):
            lines.append("run         an entry of run.json that says too little of it")
    return lines


def _made_by(run: dict[str, Any]) -> list[str]:
    """A run's provenance; KeyError or TypeError where it is not all there."""
    data = run["data"]
    limit = data["test"]["limit"] or "none"
    return [
        f"run         {run['started']}  {run['command']}",
        f"            {data['name']}, n={data['test']['n']}, limit {limit}, seed {run['seed']}",
        *(f"            {model['name']}: {model['arch']}, {model['sha256'][:12]}" for model in run["models"]),
        "            " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    ]


def _job_line(there: Runs, name: str) -> str:
    folder = there.out / name
    held = "its network" if (folder / "model.safetensors").is_file() else "no network"
    results = Store(folder / RESULTS).is_there()
    packed = ", packed" if there.is_packed(name) else ""
    return f"run         {name}: {held}{f' and {RESULTS}/' if results else ''}{packed}"


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"


def _model_lines(source: str, arch: str | None) -> list[str]:
    from coss_eval.checkpoints.load import load_model
    from coss_eval.checkpoints.normalisation import normalisation_line

    model = load_model(source, arch=arch)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    return [
        f"model       {model.name}",
        *(model.report.lines() if model.report else [f"arch        {model.arch}"]),
        f"parameters  {parameters / 1e6:.2f} M in the backbone",
        f"sites       {', '.join(model.backbone.sites)}",
        f"classes     {len(model.classes) if model.classes else 'not named in the file'}",
        normalisation_line(model),
        f"sha256      {model.sha256}",
    ]


def _data_lines(what: str, root: Path | None) -> list[str]:
    from coss_eval.data.benchmark import Benchmark
    from coss_eval.data.open import load_dataset

    data = load_dataset(what, root=root)
    splits = [split for split in (data.train, data.test) if split is not None]
    lines = [f"data        {data.name}: {len(data.classes)} classes", *(_split_line(split) for split in splits)]
    if isinstance(data, Benchmark):
        lines.append(f"corrupted   ready-made, {len(data.severities)} corruptions: {', '.join(data.severities)}")
    return [*lines, *(f"note        {line}" for line in data.warnings())]


def _split_line(split: Split) -> str:
    size = "x".join(map(str, split.native_size)) + " px" if split.native_size else "sizes vary"
    return f"{split.name:<12}{len(split)} images, {size}, fingerprint {split.fingerprint[:16]}"
