"""Budgets that keep the code readable. Raise one only with a reason beside it."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "orz_async").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]

LONGEST_FILE = 400
MEDIAN_FILE = 150
LONGEST_FUNCTION = 60
MOST_CATCH_ALLS = 8

# name -> (budget, reason)
FUNCTIONS: dict[str, tuple[int, str]] = {}
FILES: dict[str, tuple[int, str]] = {}


def lines(path: Path) -> int:
    return path.read_text().count("\n")


def test_files_are_short() -> None:
    long = {}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if lines(path) > FILES.get(name, (LONGEST_FILE, ""))[0]:
            long[name] = lines(path)
    assert not long, f"longer than {LONGEST_FILE} lines; which second noun lives here? {long}"
    median = statistics.median(lines(p) for p in SOURCES if p.name != "__init__.py")
    assert median <= MEDIAN_FILE, f"the median file has {median} lines, the budget is {MEDIAN_FILE}"


def test_functions_are_short() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                name = f"{path.relative_to(ROOT)}:{node.name}"
                if size > FUNCTIONS.get(name, (LONGEST_FUNCTION, ""))[0]:
                    long[name] = size
    assert not long, f"longer than {LONGEST_FUNCTION} lines: {long}"


def test_catch_alls_are_few() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                kind = ast.unparse(node.type) if node.type else "everything"
                if kind in {"everything", "Exception", "BaseException"}:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(found) <= MOST_CATCH_ALLS, f"a catch-all belongs at a process edge only: {found}"
