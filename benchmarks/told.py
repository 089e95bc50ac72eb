"""Commands that print what they found: run, and read back figure by figure."""

from __future__ import annotations

import re
import subprocess
import sys


class Told:
    """What a command said."""

    def __init__(self, command: str, text: str) -> None:
        self.command = command
        self.text = text

    def number(self, pattern: str) -> float:
        """Of the first group of `pattern`, which must be there; commas as in 1,000."""
        found = re.search(pattern, self.text)
        if found is None:
            raise LookupError(f"expected {pattern!r} in what `{self.command}` printed, found:\n{self.text[-3000:]}")
        return float(found[1].replace(",", ""))

    def items(self, start: str) -> list[tuple[str, int]]:
        """Names and counts of the lines that begin with `start` and go on `name 3, other name 5`."""
        lines = [line.removeprefix(start) for line in self.text.splitlines() if line.startswith(start)]
        if not lines:
            raise LookupError(f"expected '{start} ...' in what `{self.command}` printed, found:\n{self.text[-3000:]}")
        return [(name, int(count)) for line in lines for name, count in re.findall(r"(\w[^,:]*) (\d+)(?=,|$)", line)]


def tell(*words: str, timeout_s: float) -> Told:
    """Run `python -m WORDS`; RuntimeError with its last words if it fails."""
    command = f"python -m {' '.join(words)}"
    done = subprocess.run(
        [sys.executable, "-m", *words], check=False, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return Told(command, done.stdout)
