"""What the GPU benchmark does when something goes wrong: a lent device must not be wasted. Its dry run is tested beside
the interpreted kernels, in test_triton_interpreted.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_ops
from benchmarks.gpu_measure import Bench


def bench(seconds: float = 60.0) -> Bench:
    return Bench(dry=True, deadline=time.monotonic() + seconds)


def broken() -> object:
    raise RuntimeError("out of memory")


def test_a_variant_that_fails_leaves_the_comparison() -> None:
    b = bench()
    found = b.compare("op", {"first": lambda: 1, "bad": broken, "last": lambda: 2})
    assert list(found) == ["first", "last"] == [row["variant"] for row in b.rows]
    assert len(b.problems) == 1 and "op bad" in b.problems[0] and "out of memory" in b.problems[0]


def test_what_cannot_be_captured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench()
    graphed = Bench.graphed
    monkeypatch.setattr(Bench, "graphed", lambda self, calls: broken() if broken in calls else graphed(self, calls))
    assert list(b.graphs({"good": [lambda: 1], "bad": [broken]})) == ["good"]
    assert "graph of bad" in b.problems[0]


def test_after_the_deadline_nothing_begins() -> None:
    b, begun = bench(-1.0), []
    assert b.compare("op", {"late": lambda: 1}) == {}
    assert b.problems == ["op late: not run: out of time"]
    b = bench()
    with b.guarded("section"):
        b.deadline = 0.0
        with b.guarded("part"):
            begun.append("part")
        begun.append("after it")
    assert begun == []
    assert b.problems == ["section: part: not run: out of time"]


def test_a_group_that_is_late_says_which_sections_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, whose environment and path it changes: no kernel is reached."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu_ops.measure("head", True, -1.0, {}, tmp_path / "part.json")
    part = json.loads((tmp_path / "part.json").read_text())
    sections = ["check", "ppo_head", "products", "head_logprob"]
    assert part["problems"] == [f"{section}: not run: out of time" for section in sections]


def test_an_error_over_its_cap_is_a_problem_and_nan_never_passes() -> None:
    b = bench()
    for error, problems in ((1e-6, 0), (1e-4, 1), (float("nan"), 2)):
        b.check("op", "log-probs", error, 2e-5)
        assert len(b.problems) == problems
    assert [row["notes"]["passed"] for row in b.rows] == [True, False, False]


def test_a_peer_may_be_absent_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peer_of_another_torch.py").write_text("raise AttributeError('torch has no such thing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    b = bench()
    assert b.peer("peer_of_another_torch") is None and b.peer("no_such_peer") is None
    assert b.peer("json") is not None
    assert b.problems == []


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The group's process is this script, which the test writes; $out is where the part of the result goes."""
    script = tmp_path / "python"
    monkeypatch.setattr(gpu_ops.sys, "executable", str(script))
    return script


def write(script: Path, body: str) -> None:
    script.write_text(
        f'#!{os.path.realpath("/bin/sh")}\nfor a; do [ "$last" = --out ] && out=$a; last=$a; done\n{body}\n'
    )
    script.chmod(0o755)


PART = """echo '{"rows": [{"name": "measured"}], "problems": [], "ceilings": {}, "device": "some GPU"}' > "$out" """


def test_a_group_that_hangs_is_ended_with_its_children_and_keeps_what_it_measured(child: Path, tmp_path: Path) -> None:
    write(child, f"{PART}\nsleep 300 & echo $! > {tmp_path}/grandchild\nwait")
    part = gpu_ops.in_process_of_its_own("head", False, 2.0, {})
    assert part["rows"] == [{"name": "measured"}] and part["device"] == "some GPU"
    assert part["problems"] == ["head: did not end within 2 s"]
    grandchild = int((tmp_path / "grandchild").read_text())
    until = time.monotonic() + 30
    while Path(f"/proc/{grandchild}").exists() and "Z" not in Path(f"/proc/{grandchild}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "the child's own child is still there"
        time.sleep(0.01)


def test_a_group_that_dies_keeps_what_it_measured(child: Path) -> None:
    write(child, f"{PART}\nkill -{int(signal.SIGSEGV)} $$")
    part = gpu_ops.in_process_of_its_own("head", False, 60.0, {})
    assert part["rows"] == [{"name": "measured"}]
    assert part["problems"] == [f"head: ended with exit code {-signal.SIGSEGV}"]
    write(child, "exit 3")
    assert gpu_ops.in_process_of_its_own("head", False, 60.0, {})["problems"] == ["head: ended with exit code 3"]


def test_the_groups_fit_into_eight_minutes() -> None:
    assert sum(gpu_ops.GROUPS.values()) <= 470
    assert sys.version_info >= (3, 11)
