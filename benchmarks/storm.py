"""`make chaos` in rows: kills, frozen processes, wire faults, and what became of the run's promises. Ten minutes.

Both commands end with an error where a promise does not hold, and then there is no result.
"""

from __future__ import annotations

from benchmarks.protocol import Row, row
from benchmarks.told import Told, tell


def run() -> list[Row]:
    """The storm and its scenes, then the kills while saving."""
    return [
        *storm(tell("tests.chaos.run", timeout_s=1800)),
        *saves(tell("tests.chaos.saves", "--kills", "100", timeout_s=900)),
    ]


def storm(told: Told) -> list[Row]:
    name = "chaos"
    kinds = ("lean generator", "generator daemon", "learner", "launcher")
    return [
        row(name, "kill -9", "kills", [told.number(r"kill -9 +(\d+):")]),
        *(row(name, f"kill -9: {kind}s", "kills", [told.number(rf"(\d+) {kind}s[,\n]")]) for kind in kinds),
        row(name, "kill -9: learner at named points", "kills", [told.number(r"at named points +(\d+):")]),
        row(name, "named points", "points", [float(len(told.items("at named points")))]),
        row(name, "SIGSTOP", "processes", [float(sum(count for _, count in told.items("SIGSTOP")))]),
        row(name, "wire faults", "faults", [float(sum(count for _, count in told.items("proxy, ")))]),
        row(name, "detection p50", "s", [told.number(r"time to detect +p50 ([\d.]+) s")]),
        row(name, "detection p99", "s", [told.number(r"time to detect .*p99 ([\d.]+) s")]),
        row(name, "detections", "kills", [told.number(r"time to detect .*\(n = (\d+)\)")]),
        row(name, "lost", "rollouts", [told.number(r"promises +lost (\d+)")]),
        row(name, "trained twice", "rollouts", [told.number(r"promises .*trained twice (\d+)")]),
        row(name, "lag observed", "versions", [told.number(r"max lag (\d+), allowed")]),
        row(name, "lag allowed", "versions", [told.number(r"max lag \d+, allowed (\d+)")]),
        row(name, "steps replayed bit for bit", "steps", [told.number(r"bit for bit, in all (\d+) steps")]),
        row(name, "full disk: ended, refused, finished", "runs", [full_disk(told)]),
        row(name, "all of it", "s", [told.number(r"every run finished; (\d+) s")]),
    ]


def full_disk(told: Told) -> float:
    """1, or 0 where mounting a small disk is not permitted and the scene was left out."""
    told.number(r"(\d+) s  full_disk: verified")
    return 0.0 if "left out" in told.text else 1.0


def saves(told: Told) -> list[Row]:
    return [
        row("chaos, saves", "killed while saving", "kills", [told.number(r"of (\d+) loadable")]),
        row("chaos, saves", "loadable afterwards", "checkpoints", [told.number(r"(\d+) of \d+ loadable")]),
    ]
