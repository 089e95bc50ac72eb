"""Results are compared like for like, and the README says what the committed ones say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme, vllm_demo
from benchmarks.compare import check, last_committed, read, render
from benchmarks.newest import Results
from benchmarks.protocol import row, save
from benchmarks.run import SUITES


def document(folder: Path, date: str, *rows: dict[str, Any], device: str = "cpu") -> Path:
    path = folder / f"cpu_x_{date}.json"
    fields = {"schema": 1, "suite": "cpu", "device": device, "date": date, "commit": date, "rows": rows}
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def commit(folder: Path) -> None:
    subprocess.run(["git", "add", "."], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("unit", "values", "good"),
    [
        ("ms", [2.0, 2.1, 2.2], False),
        ("ms", [1.2, 1.25, 1.25], True),  # within the tolerance
        ("ms", [1.0, 2.1, 2.2], True),  # the spreads overlap
        ("ms", [0.5, 0.5, 0.5], True),
        ("tokens/s", [0.5, 0.5, 0.5], False),
        ("tokens/s", [2.0, 2.1, 2.2], True),
    ],
)
def test_worse_is_beyond_tolerance_and_spread(results: Path, unit: str, values: list[float], good: bool) -> None:
    document(results, "2026-01-01", row("gae", "cpp", unit, [0.9, 1.0, 1.1]))
    commit(results)
    fresh = read(document(results, "2026-02-01", row("gae", "cpp", unit, values)))
    told, found = check(fresh, results)
    assert found is good
    assert ("**worse**" in told) is not good


def test_a_result_names_the_command_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.json"
    for module in ("benchmarks.run", "benchmarks.vllm_engines"):
        monkeypatch.setattr("sys.argv", ["somewhere/file.py", "--only", "speed", "--out", str(out)])
        found = read(save("vllm", [], device="cpu", out=out, module=module))
        assert found["command"] == f"python -m {module} --only speed --out r.json"
    # The folder of an absolute path says nothing about a measurement.
    words = ["--python", "/opt/venv/bin/python", "--seed", "2"]
    assert vllm_demo.command_line(words) == "python -m benchmarks.vllm_demo --python python --seed 2"


def test_every_part_of_a_suite_exists() -> None:
    for suite, parts in SUITES.items():
        for part in parts:
            assert (Path(readme.__file__).parent / f"{part}.py").is_file(), f"suite {suite}: no part {part}"
    assert "vllm_engines" in SUITES["vllm"]


def test_ratios_measured_side_by_side_are_compared_instead_of_times(results: Path) -> None:
    before = row("gae", "cpp", "ms", [1.0, 1.0, 1.0]) | {"ratio_to_first": 0.5}
    slow_day = row("gae", "cpp", "ms", [9.0, 9.0, 9.0]) | {"ratio_to_first": 0.5}
    document(results, "2026-01-01", before)
    commit(results)
    assert check(read(document(results, "2026-02-01", slow_day)), results)[1]


def test_only_committed_results_of_the_same_machine_count(results: Path) -> None:
    document(results, "2026-01-01", device="gpu")
    first = document(results, "2026-01-02")
    commit(results)
    document(results, "2026-01-03")
    assert last_committed("cpu", "cpu", results) == first
    assert last_committed("e2e", "cpu", results) is None
    assert "Not the same machine" in render(read(first), read(document(results, "2026-01-04", device="gpu")))


def test_the_readme_is_made_of_the_committed_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run python -m benchmarks.readme"
    for path, drawn in readme.figures(Results()).items():
        assert path.read_text(encoding="utf-8") == drawn, f"{path.name}: run python -m benchmarks.readme"
    summary = readme.demo_summary()
    assert f"{summary.accuracy_after:.3f}" in text and readme.FIGURE.name in text
