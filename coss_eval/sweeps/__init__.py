"""Many training runs from one YAML: what they are (plan), doing them (work; on_ray), how far they are (state).

<out>/<run>/            one training run; a folder of its own, so that what two machines did is put together by copying
            job.json    the configuration, the device, the minutes; what was evaluated
            log.jsonl   the trainer's log
            model.safetensors
            results/    a results folder: coss-eval report reads it, too
<work>/<run>/           the trainer's state while a run is trained, in <out> by default; never needed afterwards
<out>/runs.zip          finished runs, once ``coss-eval pack <out>`` has put them there: read as their folders
<out>/report.md runs.csv figures/ tables/
"""

from __future__ import annotations

from importlib import resources


def shipped() -> dict[str, str]:
    """The sweeps that come with the package, each with the first line of its file, which says what it is."""
    files = {f.name.removesuffix(".yaml"): f for f in resources.files(__name__).iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text().splitlines()[0].lstrip("# ") for name in sorted(files)}
