"""Whether the numbers in a results folder are this network's: its outputs on fixed images are kept in run.json.

Weights, settings and source code are in a cell's key. What they leave out (code that a network calls from elsewhere,
another mode, another normalisation inside) shows in the outputs: a folder keeps them once for each network, and every
cell names those that it was measured with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from coss_eval.errors import UsageError
from coss_eval.models.model import Model
from coss_eval.probes.behaviour import Behaviour, apart
from coss_eval.store import canonical_json


@dataclass(frozen=True)
class Known:
    """A network beside what a folder knows of it. ``name`` is that of its outputs; None where there are none."""

    model: Model
    name: str | None = None
    same: frozenset[str] = frozenset()  # names of all outputs there that are these but for rounding
    oldest: str | None = None  # whose the cells are that name no outputs: those of earlier versions
    record: dict[str, Any] | None = None  # for run.json, where these outputs are new
    shares: Mapping[str, float] = field(default_factory=dict)  # how far each there is, in spreads between images

    def check(self, stored: Mapping[str, Any]) -> None:
        """UsageError where a stored cell is that of a network with other outputs."""
        of = stored.get("outputs", self.oldest)
        if self.name is not None and of not in self.same:
            share = self.shares.get(str(of))
            by = "" if share is None else f" ({100 * share:.2g} % of the spread between images apart)"
            raise UsageError(
                f"{self.model.name} gives other outputs than when these results were stored{by}: its code, a mode or a "
                "normalisation inside it changed; give another --out, or --overwrite"
            )


def known(model: Model, size: Sequence[int], seen: Behaviour | None, runs: Sequence[Mapping[str, Any]]) -> Known:
    """What ``runs``, a folder's run.json, have of a network that showed ``seen`` on images of (height, width)."""
    if seen is None:
        return Known(model)
    if not seen.finite:  # whatever was stored of a network that gave numbers is not this one's
        return Known(model, "NaN", frozenset({"NaN"}), "NaN")
    network = _digest({"model": model.protocol(), "image_size": list(size)})
    values = [[float(f"{value:.6g}") for value in row] for row in seen.outputs.tolist()]
    name = _digest({"network": network, "values": values})
    entries = (entry.get("outputs") for run in runs for entry in run.get("models", []))
    there = {entry["name"]: entry["values"] for entry in entries if entry and entry["network"] == network}
    shares = {other: apart(seen.outputs, torch.tensor(kept).double()) for other, kept in there.items()}
    same = {other for other, share in shares.items() if not share}
    record = None if same else {"network": network, "name": name, "values": values}
    name = min(same) if same else name
    return Known(model, name, frozenset({*same, name}), next(iter(there), name), record, shares)


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
