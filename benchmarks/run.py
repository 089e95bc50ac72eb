"""`python -m benchmarks.run SUITE [--out FILE] [--check]`: measure, print a table, write a result file.

cpu     the numeric ops, engines and the learner's step on this machine's cores
gpu     the kernels on a CUDA device, against float64 and their peers
wire    trajectories of 8k tokens through the broker: 1, 8, 64 generators, with and without CURVE and journal, and
        the journal alone
e2e     the whole engine: rollouts/s, idle by cause, part of the overlap limit, time to 90 %, both engines (12 minutes)
async   the same run at S = 0 and S = 1, side by side (minutes)
weights the weight stream alone: bytes, coding, resume, relays (minutes; memory: see benchmarks/weights.py, --layers)
vllm    vLLM against the embedded engine, and sampling while weights travel; for an interpreter that has vLLM
learning the demo at S = 0 to 8, both objectives, lambda, no critic, two seeds: 25 minutes at most, and a figure
scale   the simulator: validated against three real runs, then 8 to 1,024 GPUs with assumed rates, and a figure
demo    the demo with seeds 0, 1, 2: accuracy, length, mismatch, time (minutes)
promises  simulated histories, the largest simulation, mutated frames, and `make chaos` (a quarter of an hour)
peers   TRL's GRPO beside ours, on the demo and on long-tailed lengths: `make peers-dev` first (12 minutes)
report  `orz report` on a small run and on one of eight million rollouts (minutes, gigabytes of temporary files)
all     every suite but gpu, vllm and learning, one after the other; peers where its environment exists

`python -m benchmarks.vllm_demo --help`: the demo on vLLM daemons, one of which is killed, has a command of its own.

`--compare A B` prints the rows two result files share, and their ratio. `--check` compares with the last committed
result of the same kind of machine, and ends with 1 where something became worse beyond the spread of both.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import scale_figure
from benchmarks.compare import check, read, render
from benchmarks.protocol import Row, cpu_name, save, table

SUITES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu_ops", "engines", "learner_step"),
    "wire": ("wire", "journal"),
    "e2e": ("e2e",),
    "async": ("overlap",),
    "weights": ("weights",),
    "report": ("report",),
    "scale": ("scale",),
    "demo": ("demo",),
    "promises": ("promises", "storm"),
    "vllm": ("vllm_engines",),
    "peers": ("peers",),
}
"""Suite -> its parts: modules of this folder with `run() -> list[Row]`. The suite gpu has a command of its own."""

FIGURES: dict[str, Callable[[list[Row], Path], Path]] = {"scale": scale_figure.draw}
"""Parts that are drawn too, beside their result file."""


def measure(suite: str, only: list[str], settings: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Every part in turn, with what `settings` has for it."""
    rows: list[Row] = []
    for part in only or SUITES[suite]:
        print(f"-- {part}", flush=True)
        measured: list[Row] = importlib.import_module(f"benchmarks.{part}").run(**settings.get(part, {}))
        print(table(measured), flush=True)
        rows += measured
    return rows


def run_suite(
    suite: str, only: list[str], out: Path | None, *, checked: bool, settings: Mapping[str, dict[str, Any]]
) -> bool:
    """Measure and save; False if it was checked and something became worse."""
    rows = measure(suite, only, settings)
    path = save(suite, rows, device=cpu_name(), out=out)
    print(path)
    for draw in (FIGURES[part] for part in SUITES[suite] if part in FIGURES):
        print(draw(rows, path.with_suffix(".svg")))
    if not checked:
        return True
    told, good = check(read(path))
    print(told)
    return good


def available() -> list[str]:
    """The suites of `all`; peers is named where it cannot run."""
    suites = [suite for suite in SUITES if suite != "vllm"]
    if importlib.import_module("benchmarks.peers").available():
        return suites
    print("peers is left out: its environment is missing; `make peers-dev` makes it", flush=True)
    return [suite for suite in suites if suite != "peers"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("suite", nargs="?", choices=[*SUITES, "gpu", "learning", "all"])
    parser.add_argument("--only", nargs="*", default=[], help="these parts of the suite only, or variants of learning")
    parser.add_argument("--steps", type=int, help="learning: learner steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="learning: seeds of each variant (%(default)s)")
    parser.add_argument("--layers", type=int, help="weights: layers of the large model, of 24; default all")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/SUITE_DEVICE_DATE.json")
    parser.add_argument("--check", action="store_true", help="compare with the last committed result, 1 if worse")
    parser.add_argument(
        "--vllm", type=Path, help="e2e: interpreter with vLLM; default .venv-vllm/bin/python if it exists"
    )
    parser.add_argument("--dry-run", action="store_true", help="gpu: tiny shapes on the CPU, Triton interpreted")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    options = parser.parse_args()
    if options.compare:
        print(render(*(read(path) for path in options.compare)))
    elif options.suite is None:
        parser.error(f"name a suite: {', '.join([*SUITES, 'gpu', 'all'])}")
    elif options.suite == "gpu":
        problems: int = importlib.import_module("benchmarks.gpu_ops").run(options.out, options.dry_run)
        raise SystemExit(1 if problems else 0)
    elif options.suite == "learning":
        learning = importlib.import_module("benchmarks.learning")
        steps, seeds = options.steps or learning.STEPS, tuple(range(options.seeds))
        rows = learning.run(steps=steps, seeds=seeds, only=tuple(options.only))
        path = save("learning", rows, device=cpu_name(), out=options.out)
        print(table(rows), path, learning.draw(rows, path.with_suffix(".svg")), sep="\n")
    else:
        suites = available() if options.suite == "all" else [options.suite]
        if unknown := set(options.only) - {part for suite in suites for part in SUITES[suite]}:
            parser.error(f"no part of {options.suite}: {', '.join(sorted(unknown))}")
        # What the run of a part takes.
        settings: dict[str, dict[str, Any]] = {"e2e": {"vllm": options.vllm}}
        if options.layers:
            settings["weights"] = {"layers": options.layers}
        results = [
            run_suite(
                suite, options.only, options.out if len(suites) == 1 else None, checked=options.check, settings=settings
            )
            for suite in suites
        ]
        raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
