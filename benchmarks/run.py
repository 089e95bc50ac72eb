"""`python -m benchmarks.run SUITE [--out FILE]`: measure, print a table, write a result file.

cpu   the numeric ops, weights, engines and the learner's step on this machine's cores
gpu   the kernels on a CUDA device, against float64 and their peers
wire  trajectories of 8k tokens through the broker: 1, 8, 64 generators, with and without CURVE and journal
async the same run at S = 0 and S = 1, side by side (minutes)
weights  the weight stream alone: bytes, coding, resume, relays (minutes, 9 GiB)
learning  the demo at S = 0 to 8, both objectives, lambda, no critic, two seeds; at most 25 minutes, and a figure

`--compare A B` prints the rows two result files share, and their ratio.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from benchmarks.protocol import Row, cpu_name, save, table

CPU_PARTS = ("cpu_ops", "weights", "engines", "learner_step")


def cpu(only: list[str]) -> list[Row]:
    """Every part in turn; a part is a module with `run() -> list[Row]`."""
    rows: list[Row] = []
    for part in only or CPU_PARTS:
        print(f"-- {part}", flush=True)
        measured: list[Row] = importlib.import_module(f"benchmarks.{part}").run()
        print(table(measured), flush=True)
        rows += measured
    return rows


def compare(first: Path, second: Path) -> str:
    """Medians of the rows both files have."""
    documents = [json.loads(path.read_text()) for path in (first, second)]
    rows = [{(r["name"], r["variant"]): r for r in document["rows"]} for document in documents]
    lines = [f"{'benchmark':<34} {'variant':<30} {documents[0]['commit']:>12} {documents[1]['commit']:>12} ratio"]
    for key in rows[0].keys() & rows[1].keys():
        a, b = rows[0][key]["median"], rows[1][key]["median"]
        lines.append(f"{key[0]:<34} {key[1]:<30} {a:>12.4g} {b:>12.4g} {b / a:.3f}")
    return "\n".join([lines[0], *sorted(lines[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("suite", nargs="?", choices=["cpu", "gpu", "wire", "async", "weights", "learning"])
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help=f"parts of the cpu suite ({', '.join(CPU_PARTS)}), or variants of learning",
    )
    parser.add_argument("--steps", type=int, help="learning: learner steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="learning: seeds of each variant")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/SUITE_DEVICE_DATE.json")
    parser.add_argument("--dry-run", action="store_true", help="gpu: tiny shapes on the CPU, Triton interpreted")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    options = parser.parse_args()
    if options.compare:
        print(compare(*options.compare))
    elif options.suite == "gpu":
        problems: int = importlib.import_module("benchmarks.gpu_ops").run(options.out, options.dry_run)
        raise SystemExit(1 if problems else 0)
    elif options.suite in ("async", "wire"):
        rows = importlib.import_module({"async": "benchmarks.overlap", "wire": "benchmarks.wire"}[options.suite]).run()
        print(table(rows))
        print(save(options.suite, rows, device=cpu_name(), out=options.out))
    elif options.suite == "weights":
        print(save("weights", cpu(["weights"]), device=cpu_name(), out=options.out))
    elif options.suite == "learning":
        learning = importlib.import_module("benchmarks.learning")
        rows = learning.run(
            steps=options.steps or learning.STEPS, seeds=tuple(range(options.seeds)), only=tuple(options.only)
        )
        print(table(rows))
        path = save("learning", rows, device=cpu_name(), out=options.out)
        print(path, learning.draw(rows, path.with_suffix(".png")))
    elif options.suite == "cpu":
        print(save("cpu", cpu(options.only), device=cpu_name(), out=options.out))
    else:
        parser.error("name a suite: cpu, gpu, wire, async, weights or learning")


if __name__ == "__main__":
    main()
