"""`orz report` on runs of two sizes: seconds, peak memory and size of the page.

Alone among the parts it writes gigabytes: `python -m benchmarks.run report`. The folder of the large run is temporary.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.protocol import Row, row
from benchmarks.synthetic_run import write_run

SIZES = {"100 steps x 128 rollouts": (100, 32, 4), "1,000 steps x 8,192 rollouts": (1000, 128, 64)}
_MEASURE = """
import json, resource, sys, time
started = time.perf_counter()
from pathlib import Path
from orz_async.report.page import report
out = Path(sys.argv[2])
report([Path(sys.argv[1])], out)
wall, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, out.stat().st_size / 1e6]))
"""


def measure(run: Path, out: Path) -> list[float]:
    """Wall seconds and CPU seconds with all imports, peak MiB, and MB of the page, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(run), str(out)], check=True, capture_output=True, text=True
    )
    figures: list[float] = json.loads(done.stdout)
    return figures


def run(repeats: int = 3) -> list[Row]:
    rows: list[Row] = []
    for name, (steps, prompts, samples) in SIZES.items():
        with tempfile.TemporaryDirectory(prefix="orz-report-") as folder:
            need = steps * prompts * samples * 400
            if shutil.disk_usage(folder).free < 2 * need:
                print(f"left out: {name} needs {2 * need / 1e9:.0f} GB of free space in {folder}", file=sys.stderr)
                continue
            path = Path(folder) / "run"
            write_run(path, steps=steps, prompts=prompts, samples=samples, generators=8)
            figures = [measure(path, Path(folder) / "report.html") for _ in range(repeats)]
        for unit, values in zip(("s", "cpu s", "MiB", "MB page"), zip(*figures, strict=True), strict=True):
            rows.append(row("report", name, unit, list(values), load_average=os.getloadavg()[0]))
    return rows
