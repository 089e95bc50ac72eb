"""What the committed results say: rows by suite and name, from the newest file that has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import RESULTS, Row

DEVICES = ("AMD EPYC, 2 cores", "Intel(R) Xeon(R) Processor, 2 cores")
"""README's machines; results of others may lie beside theirs."""


class Absent(LookupError):
    """No result file has such rows: nobody has measured them here, or not yet."""


class Rows(dict[str, Row]):
    """Variant -> row, of one name in one file; `variant, unit` where a variant has several."""

    def __missing__(self, variant: str) -> Row:
        raise LookupError(f"expected a row {variant!r}, found {', '.join(self)}; was the variant renamed?")

    def median(self, variant: str) -> float:
        return float(self[variant]["median"])

    def ratio(self, variant: str) -> float:
        """To the first variant, turn by turn."""
        return float(self[variant]["ratio_to_first"])

    def starting(self, start: str) -> Rows:
        return Rows({variant: row for variant, row in self.items() if variant.startswith(start)})


class Results:
    """The files of a folder."""

    def __init__(self, folder: Path = RESULTS, devices: Sequence[str] = DEVICES) -> None:
        found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
        own = [(path, d) for path, d in found if d.get("schema") == 1 and d["device"] in devices]
        self._newest_first = sorted(own, key=lambda pair: (str(pair[1]["date"]), pair[0].name), reverse=True)
        self._folder = folder
        self.asked: set[str] = set()
        """Machines of the rows that were asked for, until somebody clears it."""

    @property
    def device(self) -> str:
        """The machine that most files are from; of several, the one with the newest."""
        counts = Counter(str(document["device"]) for _, document in self._newest_first)
        return counts.most_common(1)[0][0] if counts else ""

    def rows(self, suite: str, name: str) -> Rows:
        """All variants of `name`; Absent if no file of the suite has it. A part of a suite may have its own file."""
        for _, document in self._newest_first:
            found = [r for r in document["rows"] if r["name"] == name]
            if document["suite"] == suite and found:
                self.asked.add(str(document["device"]))
                counts = Counter(r["variant"] for r in found)
                return Rows(
                    {r["variant"] if counts[r["variant"]] == 1 else f"{r['variant']}, {r['unit']}": r for r in found}
                )
        raise Absent(f"no result of {suite} with rows named {name!r} in {self._folder.name}")

    def file(self, suite: str) -> tuple[Path, list[Row]]:
        """The newest file of a suite and all its rows."""
        for path, document in self._newest_first:
            if document["suite"] == suite:
                return path, document["rows"]
        raise Absent(f"no result of {suite} in {self._folder.name}")

    def plain(self, start: str) -> dict[str, Any]:
        """The newest file whose name begins so and which is no table of rows."""
        found = sorted(self._folder.glob(f"{start}_*.json"))
        if not found:
            raise Absent(f"no {start}_*.json in {self._folder.name}")
        document: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
        return document
