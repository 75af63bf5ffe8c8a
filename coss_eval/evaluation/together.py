"""What several processes of one evaluation do together before they share its cells.

Cells are shared whole: each process takes the next one that nobody is at, and stores it. What a cell computes of an
image is combined over images in a way of its own (calibration, moments, curves, checks on a few images), for tasks of
others too, so that a share of the images would be a share of no number; a whole cell has one process's numbers to the
bit, needs nobody else, and fails alone. One cell is thus one process's: a run of fewer cells than processes leaves
some of them idle.

What many cells read, the features of whole splits, is shared by images: each process passes its part of them through
the network, none twice and none to fill up, and all parts together go into the cache of every machine. The linear
probes on them are fitted by one process each.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from coss_eval.data.split import Split
from coss_eval.evaluation.planning import Plan
from coss_eval.probes.features import Features, extract_known, keep_features, kept_features
from coss_eval.probes.fit import fitted_probe
from coss_eval.runtime.processes import first_says, gathered, rank, world_size
from coss_eval.tasks.task import Subject


def prepare(planned: Plan) -> None:
    """Have the features and probes that missing cells read in the cache; all processes of the run call it.

    Nothing without a cache, where each process makes its own, nor for a network whose outputs depend on its batch: its
    parts of the images would make other batches. What fails here is left to the cells, which say why.
    """
    fits: list[Subject] = []
    for number, name in first_says(_wanted(planned)):
        subject = planned.subjects[number]
        split = subject.data.train if name == "train" else subject.data.test
        if split is not None and extract_together(subject, split) and name == "train":
            fits.append(subject)
    for subject in fits[rank() :: world_size()]:
        assert subject.data.train is not None
        with suppress(Exception):  # its cells will say how
            fitted_probe(subject.model, subject.data.train, subject.compute)
    gathered(None)  # until all are fitted


def most_expensive_first(planned: Plan) -> None:
    """Order the jobs by the first process's estimate of their costs, so that no long one is begun at the end."""
    costs = first_says(dict(zip(_names(planned), planned.costs or [], strict=False)) if rank() == 0 else None)
    if costs:
        planned.jobs.sort(key=lambda job: -costs.get(job.keys[0], 0.0))
        planned.costs = [costs.get(name, 0.0) for name in _names(planned)]


def _names(planned: Plan) -> list[str]:
    """A key of each job: processes may have planned at different times, and yet another one may have done some."""
    return [job.keys[0] for job in planned.jobs]


def _wanted(planned: Plan) -> list[tuple[int, str]]:
    """Each subject's number with a split whose features its missing cells read."""
    places = {id(subject): number for number, subject in enumerate(planned.subjects)}
    found = {
        (places[id(subject)], name): None
        for job in planned.jobs
        for subject in job.subjects
        if subject.compute.cache and subject.model.batch_size is None
        for name in job.task.reads(subject)
    }
    return [*found]


def extract_together(subject: Subject, split: Split) -> bool:
    """Put the features of a split into the cache, each process computing a part; False where one of them could not.

    Nothing is computed where all have them already.
    """
    model, compute = subject.model, subject.compute
    if all(gathered(kept_features(model, split, compute) is not None)):
        return True
    mine = np.array_split(np.arange(len(split)), world_size())[rank()]
    found: Features | None = None
    with suppress(Exception):  # its cells will say how
        found = extract_known(model, split.subset(mine), replace(compute, cache=False))
    able = all(gathered(found is not None))
    if found is None or not able:
        return False
    whole = _of_all(found)
    if whole is not None:
        keep_features(whole, model, split, compute)
    gathered(None)  # until it is kept
    return True


def _of_all(found: Features) -> Features | None:
    """The processes' parts one after the other, in the first process of each machine; None in others.

    A part is sent at a time, so that no process but these holds more than two.
    """
    values = found.values["global"]
    counts = gathered(len(found))
    keeps = os.environ.get("LOCAL_RANK", "0") == "0"
    whole = [torch.empty(sum(counts), *rest, dtype=dtype) for rest, dtype in _forms(found)] if keeps else None
    start = 0
    for number, count in enumerate(counts):
        for place, (tensor, (rest, dtype)) in enumerate(
            zip((found.ids, found.labels, values), _forms(found), strict=True)
        ):
            part = tensor.contiguous() if number == rank() else torch.empty(count, *rest, dtype=dtype)
            dist.broadcast(part, number)
            if whole is not None:
                whole[place][start : start + count] = part
        start += count
    if whole is None:
        return None
    ids, labels, joined = whole
    return Features(ids, labels, {"global": joined})


def _forms(found: Features) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape behind the number of images, and type, of ids, labels and values."""
    tensors: tuple[Tensor, ...] = (found.ids, found.labels, found.values["global"])
    return [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors]
