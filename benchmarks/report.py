"""CPU seconds and memory of `coss-eval report` on synthetic stores, as a ratio to reading the store plain.

    python benchmarks/report.py [CELLS ...]

Plain reading is the store's own: every cell's record and its samples. Both are measured in processes of their own, with
their imports, since those count for whoever waits. CPU seconds depend on what else the machine does; the ratio hardly.
The stores have checkpoints with every task, 1,000 images each: single ones, and methods with six seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from coss_eval.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reports"))

MEASURE = """
import json, resource, sys, time
{work}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([time.process_time(), peak / 1024]))
"""
PLAIN = """
from coss_eval.store import Store
store = Store(sys.argv[1])
for record in store.records():
    store.samples(record["key"])
"""
REPORT = """
from coss_eval import reports
reports.write(sys.argv[1], out=sys.argv[2])
"""
NO_FIGURES = """
from coss_eval.reports import document, html, latex, layout, markdown
from coss_eval.reports.results import Results
from coss_eval.store import Store
page = document.build(Results(Store(sys.argv[1])))
markdown.render(page), html.render(page, {}), [(layout.to_csv(t), latex.latex(t)) for t in page.tables]
"""


def measured(work: str, *arguments: str) -> tuple[float, float]:
    """CPU seconds and peak MiB of a process that does ``work``."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE.format(work=work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main(sizes: list[int]) -> None:
    from synthetic_runs import fleet

    print("| cells | checkpoints | seeds | plain, s | page, s | report, s | report / plain | page, MiB | report, MiB |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for cells in sizes:
        for seeds in (0, 6):
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder) / "store")
                count = len(fleet(Store(store), cells, images=1000, seeds=seeds))
                plain, _ = measured(PLAIN, store)
                page, page_peak = measured(NO_FIGURES, store)
                report, peak = measured(REPORT, store, str(Path(folder) / "out"))
            numbers = f"{plain:.1f} | {page:.1f} | {report:.1f} | {report / plain:.1f} | {page_peak:.0f} | {peak:.0f}"
            print(f"| {cells} | {count} | {seeds or 1} | {numbers} |", flush=True)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1000, 5000])
