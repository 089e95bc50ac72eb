"""What is promised, tested at full size: simulated histories with faults, the largest simulation, mutated frames.

The commands are those of `make sim` and `make fuzz`, with what they print taken into rows. Minutes.
"""

from __future__ import annotations

from benchmarks.protocol import Row, row
from benchmarks.told import Told, tell

SEEDS = 1000
FRAMES = 1_000_000


def run(seeds: int = SEEDS, frames: int = FRAMES) -> list[Row]:
    """Each command once."""
    return [
        *histories(tell("orz_async.cli", "sim", "--seeds", str(seeds), timeout_s=1200)),
        *large(tell("orz_async.cli", "sim", "--scale", timeout_s=1200)),
        *fuzz(tell("tests.fuzz_wire", str(frames), timeout_s=1200)),
    ]


def histories(told: Told) -> list[Row]:
    name = "ledger under simulated faults"
    return [
        row(name, "histories", "simulated", [told.number(r"^([\d,]+) histories")]),
        row(name, "faults", "simulated", [told.number(r"faults +([\d,]+)")]),
        row(name, "restarts of the learner", "simulated", [told.number(r"restarts +([\d,]+)")]),
        row(name, "rollouts trained", "simulated", [told.number(r"rollouts +([\d,]+)")]),
        row(name, "violations", "simulated", [told.number(r"violations +([\d,]+)")]),
        row(name, "one core", "cpu s", [told.number(r"in ([\d.]+) s of one core")]),
    ]


def large(told: Told) -> list[Row]:
    name = "many generators, simulated"
    return [
        row(name, "generators", "simulated", [told.number(r"^([\d,]+) generators")]),
        row(name, "steps", "simulated", [told.number(r"generators, ([\d,]+) steps")]),
        row(name, "rollouts a step", "simulated", [told.number(r"steps of ([\d,]+) rollouts")]),
        row(name, "one core", "cpu s", [told.number(r"in ([\d.]+) s of one core")]),
    ]


def fuzz(told: Told) -> list[Row]:
    """It ends with an error at the first frame that raises anything, so a count here is one without."""
    name = "mutated frames"
    return [
        row(name, "frames without a crash", "frames", [told.number(r"([\d,]+) mutated frames in")]),
        row(name, "all of them", "s", [told.number(r"mutated frames in ([\d.]+) s")]),
        row(name, "growth of memory", "MiB", [told.number(r"grew by (-?[\d.]+) MiB")]),
    ]
