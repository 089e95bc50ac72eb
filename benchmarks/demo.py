"""The demo, `make demo SEED=0`, 1, 2, as a newcomer runs it after installation: base model, training, evaluation.

Each run's whole summary.json goes into the notes: README's first figure and table are made of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.protocol import Row, row

SEEDS = (0, 1, 2)


def run(seeds: tuple[int, ...] = SEEDS) -> list[Row]:
    """A row of the held-out accuracy for each seed, then the seconds of all."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        base_s = timed("make-base", "--out", str(folder / "base"))
        taken, rows = [], []
        for seed in seeds:
            out = folder / f"demo{seed}"
            taken.append(base_s + train(seed, out, folder / "base"))
            rows.append(of_summary(seed, json.loads((out / "summary.json").read_text())))
    return [*rows, row("demo", "from the command to the result", "s", taken, base_s=base_s)]


def of_summary(seed: int, summary: dict[str, Any]) -> Row:
    return row("demo", f"seed {seed}", "accuracy", [summary["accuracy_after"]], summary=summary)


def train(seed: int, out: Path, base: Path) -> float:
    """Seconds of what `orz demo` runs, from the base model that was made just now, not from one that lies around."""
    data = ("--data.train", str(base / "train.jsonl"), "--data.heldout", str(base / "heldout.jsonl"))
    return timed(
        "run", "tiny_cpu", "--seed", str(seed), "--run-dir", str(out), "--model.path", str(base / "model"), *data
    )


def timed(*words: str) -> float:
    """Seconds of a command of `orz`; RuntimeError with its last words if it fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", "orz_async.cli", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(
            f"orz {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return time.monotonic() - began
