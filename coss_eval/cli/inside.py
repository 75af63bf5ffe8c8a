"""Commands that look inside networks and compare them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from coss_eval.cli.app import EVALUATE, app
from coss_eval.cli.flags import Chosen, DataFlags, ModelFlags, OfData, OfTask, PassFlags
from coss_eval.tasks.flags import Words


@app.command(group=EVALUATE)
def similarity(
    *,
    sites: Chosen = (),
    measures: OfTask[Words] = ("cka", "rsa"),
    recordings: Chosen = (),
    locations: OfTask[Literal["mean", "all"]] = "mean",
    images: OfTask[int] = 1000,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: PassFlags | None = None,
) -> int:
    """How alike networks and their layers are on the same images: a heat map and a table, with intervals.

    Parameters
    ----------
    sites
        Sites to compare, of every network: stage1 stage2 prepool global [default: all that each has].
    measures
        Any of cka (debiased, of all images), rsa and procrustes (of the first --images).
    recordings
        NAME=FILE.npz, with ids (of the test images, or their keys) and one of units (images, units), locations (images,
        locations, units) and repeats (images, repeats, units), which get a noise ceiling; repeat it for others.
    locations
        What a map is: the mean over its locations, or all of them side by side, for cka.
    images
        Number of fixed images for rsa and procrustes; 5000 at most.
    """
    from coss_eval.evaluation.similarity import read_recordings, similarities
    from coss_eval.runtime.live import progress_line, say, say_report
    from coss_eval.store import Store

    recorded = [read_recordings(text) for text in recordings]

    loaded, dataset, run = (models or ModelFlags()).load(), (data or DataFlags()).open(), run or PassFlags()
    name = "-".join(["similarity", dataset.name, *(model.name for model in loaded)]).replace("/", "-")
    folder = run.out or Path("results") / name
    with progress_line(quiet=run.quiet) as on_progress:
        found = similarities(
            loaded,
            dataset,
            sites=sites,
            measures=measures,
            recordings=recorded,
            locations=locations,
            images=images,
            limit=run.limit,
            seed=run.seed,
            device=run.device,
            batch_size=run.batch_size,
            on_progress=on_progress,
            on_note=None if run.quiet else lambda line: say(f"WARNING     {line}"),
        )
    found.write(folder)
    Store(folder).record_run(found.entry)
    say(f"similarity  {len(found.places)} representations compared")
    say_report(folder / "report.md", "report.html, figures/ and, for every number, similarity.csv")
    return 0


@app.command(group=EVALUATE)
def extract(
    *,
    sites: Chosen = ("global",),
    split: OfData[Literal["test", "train"]] = "test",
    format: OfTask[Literal["npy", "safetensors", "hdf5"]] = "npy",
    locations: OfTask[Literal["mean", "all"]] = "mean",
    dissimilarity: OfTask[Literal["correlation", "cosine", "euclidean"] | None] = None,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: PassFlags | None = None,
) -> int:
    """Write features for other tools: a file a site, with ids, labels, file keys and what made them beside.

    Parameters
    ----------
    sites
        Places in each network: stage1 stage2 prepool global.
    split
        Which images.
    format
        Of the files; hdf5 needs h5py.
    locations
        The mean over a map's locations (N, D), or each of them (N, L, D).
    dissimilarity
        Write the dissimilarity matrix (N, N) of each site, too, for 5000 images at most.
    """
    from coss_eval.evaluation.extraction import write_features
    from coss_eval.runtime.live import progress_line, say

    loaded, dataset, run = (models or ModelFlags()).load(), (data or DataFlags()).open(), run or PassFlags()
    folder = run.out or Path("features") / dataset.name.replace("/", "-")
    with progress_line(quiet=run.quiet) as on_progress:
        paths = write_features(
            loaded,
            dataset,
            folder,
            sites=sites,
            split=split,
            format=format,
            locations=locations,
            dissimilarity=dissimilarity,
            limit=run.limit,
            seed=run.seed,
            device=run.device,
            batch_size=run.batch_size,
            on_progress=on_progress,
            on_note=None if run.quiet else lambda line: say(f"WARNING     {line}"),
        )
    for path in paths:
        say(str(path))
    return 0


@app.command(group=EVALUATE)
def heatmaps(
    *,
    of: OfTask[str] = "global",
    site: OfTask[str] = "prepool",
    images: OfTask[int] = 6,
    models: ModelFlags | None = None,
    data: DataFlags | None = None,
    run: PassFlags | None = None,
) -> int:
    """Draw where an image's locations agree with the rest of it, or with something else, networks side by side.

    Parameters
    ----------
    of
        What each location is compared with: global (the image's other locations), ROW,COLUMN (one of them, as 3,4),
        another (another image), or evidence (what it gives to the logit of the image's class).
    site
        Where the locations are: prepool, stage1, ...
    images
        Number of test images to show.
    """
    from coss_eval.evaluation.saliency import write_heatmaps
    from coss_eval.runtime.live import say

    loaded, dataset, run = (models or ModelFlags()).load(), (data or DataFlags()).open(), run or PassFlags()
    folder = run.out or Path("results") / f"heatmaps-{dataset.name}".replace("/", "-")
    paths = write_heatmaps(
        loaded,
        dataset,
        folder,
        of=_target(of),
        site=site,
        images=images,
        limit=run.limit or 1000,
        seed=run.seed,
        device=run.device,
        batch_size=run.batch_size,
        on_note=None if run.quiet else lambda line: say(f"WARNING     {line}"),
    )
    for path in paths:
        say(str(path))
    return 0


def _target(of: str) -> Any:
    """ "3,4" is a location (3, 4); any other word itself."""
    parts = of.split(",")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdecimal, parts)) else of
