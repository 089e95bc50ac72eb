"""Two result files side by side, and a fresh one against the last that was committed for the same kind of machine.

Machines are noisy: a row counts as slower only where its whole spread lies outside the other's, by more than a
tolerance. Where both files measured a row against the first variant of its benchmark, that ratio is compared instead of
the time: what ran beside it slowed down both.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.protocol import RESULTS, Row

Document = dict[str, Any]
TOLERANCE = 0.3
"""Fraction by which a median may be worse before it is called a regression."""


class Pair(NamedTuple):
    """A row that both files have."""

    name: str
    variant: str
    unit: str
    before: float
    after: float
    ratio: float
    """after / before; of the ratios to the first variant where both have one."""
    is_apart: bool
    """The spreads do not overlap."""

    @property
    def is_worse(self) -> bool:
        worse = self.ratio < 1 / (1 + TOLERANCE) if more_is_better(self.unit) else self.ratio > 1 + TOLERANCE
        return worse and self.is_apart


def more_is_better(unit: str) -> bool:
    """Rates are; times, memory and sizes are not."""
    return unit.endswith("/s") or unit in ("ratio", "accuracy")


def read(path: Path) -> Document:
    document: Document = json.loads(path.read_text())
    if document.get("schema") != 1 or not isinstance(document.get("rows"), list):
        raise SystemExit(f"{path}: expected a result file of benchmarks.run, schema 1; found something else")
    return document


def pairs(before: Document, after: Document) -> list[Pair]:
    """Rows of both, in the order of the second."""
    old = {(r["name"], r["variant"], r["unit"]): r for r in before["rows"]}
    return [_pair(old[key], row) for row in after["rows"] if (key := (row["name"], row["variant"], row["unit"])) in old]


def _pair(before: Row, after: Row) -> Pair:
    relative = "ratio_to_first" in before and "ratio_to_first" in after
    old, new = (r["ratio_to_first"] if relative else r["median"] for r in (before, after))
    apart = after["min"] > before["max"] or after["max"] < before["min"]
    ratio = new / old if old else float("inf")
    return Pair(after["name"], after["variant"], after["unit"], before["median"], after["median"], ratio, apart)


def render(before: Document, after: Document) -> str:
    """The rows of both as a Markdown table."""
    lines = [
        f"| benchmark | variant | unit | {before['commit']} | {after['commit']} | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    for p in pairs(before, after):
        mark = " **worse**" if p.is_worse else ""
        lines.append(f"| {p.name} | {p.variant} | {p.unit} | {p.before:.4g} | {p.after:.4g} | {p.ratio:.3f}{mark} |")
    if before["device"] != after["device"]:
        lines.append(f"\nNot the same machine: {before['device']} and {after['device']}.")
    return "\n".join(lines)


def last_committed(suite: str, device: str, folder: Path = RESULTS) -> Path | None:
    """The newest committed result of this suite on this kind of machine; files that git does not know do not count."""
    done = subprocess.run(
        ["git", "ls-files", "--", "."], cwd=folder, capture_output=True, text=True, timeout=30, check=False
    )
    found = []
    for name in done.stdout.split():
        path = folder / name
        if name.startswith(f"{suite}_") and name.endswith(".json") and path.exists():
            document = read(path)
            if document["device"] == device:
                found.append((document["date"], name, path))
    return max(found)[2] if found else None


def check(fresh: Document, folder: Path = RESULTS) -> tuple[str, bool]:
    """What to say of a fresh result, and whether nothing became worse."""
    committed = last_committed(fresh["suite"], fresh["device"], folder)
    if committed is None:
        return f"no committed {fresh['suite']} result of {fresh['device']} to compare with", True
    before = read(committed)
    worse = [p for p in pairs(before, fresh) if p.is_worse]
    told = f"compared with {committed.name}, commit {before['commit']}:\n{render(before, fresh)}"
    if worse:
        told += f"\n{len(worse)} worse by more than {TOLERANCE:.0%}, beyond the spread of both"
    return told, not worse
