"""The event log: whole lines, whatever happens to the process or the disk; and typed ends of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from orz_async.errors import DiskError
from orz_async.observe.events import EventLog
from orz_async.observe.process import read_records
from orz_async.observe.tail import Tail

ROOT = Path(__file__).parents[2]


def test_lines_carry_time_process_kind_and_fields(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events" / "learner-0.jsonl", "learner-0")
    log.emit("step", loss=np.float32(0.5), lags={1: 3}, nothing=float("nan"), path=tmp_path, n=np.int64(3))
    log.close()
    log.emit("after", it="is closed")
    first, second = map(json.loads, (tmp_path / "events" / "learner-0.jsonl").read_text().splitlines())
    assert first["kind"] == "process"
    assert first["pid"] == os.getpid()
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (second["v"], second["process"], second["kind"]) == (1, "learner-0", "step")
    assert (second["loss"], second["lags"], second["nothing"]) == (0.5, {"1": 3}, None)
    assert (second["path"], second["n"]) == (str(tmp_path), 3)
    assert second["t"] >= first["t"]
    assert second["m"] >= first["m"]


def test_a_field_that_is_no_json_is_a_bug_not_a_lost_event(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")
    with pytest.raises(TypeError, match="object"):
        log.emit("step", thing=object())
    log.close()


def test_a_torn_line_of_a_killed_process_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "learner-0.jsonl"
    log = EventLog(path, "learner-0")
    log.emit("step", step=0)
    log.close()
    with path.open("ab") as file:
        file.write(b'{"v":1,"t":1.0,"m":1.0,"process":"learner-0","kind":"st')  # kill -9 inside write(2)
    tail = Tail(tmp_path)
    assert [e["kind"] for e in tail.poll()] == ["process", "step"]
    again = EventLog(path, "learner-0")
    again.emit("step", step=1)
    again.close()
    assert [e.get("step") for e in tail.poll() if e["kind"] == "step"] == [1]
    assert tail.unreadable == 1
    assert [e.get("step") for e in Tail(tmp_path).poll() if e["kind"] == "step"] == [0, 1]


def test_the_tail_reads_every_line_once_and_sorts_by_time(tmp_path: Path) -> None:
    a, b = EventLog(tmp_path / "a.jsonl", "a"), EventLog(tmp_path / "b.jsonl", "b")
    tail = Tail(tmp_path)
    assert len(tail.poll()) == 2
    b.emit("one")
    a.emit("two")
    b.emit("three")
    assert [e["kind"] for e in tail.poll()] == ["one", "two", "three"]
    assert tail.poll() == []
    a.close()
    b.close()
    (tmp_path / "a.jsonl").write_text("")  # --overwrite
    log = EventLog(tmp_path / "a.jsonl", "a")
    log.close()
    assert [e["kind"] for e in tail.poll()] == ["process"]


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    line = b'{"v":1,"t":1.0,"kind":"step"}\n'
    tail = Tail(tmp_path)
    with (tmp_path / "a.jsonl").open("ab", buffering=0) as file:
        file.write(line + line[:10])
        assert len(tail.poll()) == 1
        assert tail.poll() == []
        file.write(line[10:])
        assert len(tail.poll()) == 1
    assert tail.unreadable == 0


@pytest.mark.parametrize("line", [b"[]", b'{"v":2,"t":1.0,"kind":"x"}', b'{"v":1,"t":"x","kind":"x"}', b"\xff", b"{"])
def test_the_tail_skips_and_counts_what_is_no_event(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(line + b"\n" + b'{"v":1,"t":1.0,"kind":"good"}\n')
    tail = Tail(tmp_path)
    assert [e["kind"] for e in tail.poll()] == ["good"]
    assert tail.unreadable == 1


def test_a_full_disk_drops_and_counts_and_recovers(tmp_path: Path) -> None:
    # A pipe nobody reads, not a full disk, but the same to write(2): it takes a part of a line, then nothing.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    log = EventLog.disabled()
    log._file = writer
    sent = 0
    while log.dropped < 3:
        log.emit("step", number=sent, filler="x" * 5000)
        sent += 1
    received = os.read(reader, 1 << 20)
    log.emit("step", number=sent)
    received += os.read(reader, 1 << 20)
    lines = received.split(b"\n")
    assert json.loads(lines[-2])["dropped"] == 3
    assert json.loads(lines[-2])["number"] == sent
    good = [json.loads(line)["number"] for line in lines[:-2] if line.endswith(b"}")]
    assert good == list(range(sent - 3))
    assert log.dropped == 0
    log.close()
    os.close(reader)


def test_dev_full_never_raises() -> None:
    log = EventLog.disabled()
    log._file = os.open("/dev/full", os.O_WRONLY)
    log.emit("step", step=1)
    assert log.dropped == 1
    log.close()


def test_a_log_that_cannot_be_opened_is_a_disk_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match="expected a writable event log"):
        EventLog(tmp_path / "events" / "a.jsonl", "a")


def test_threads_do_not_mix_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a.jsonl", "a")

    def write(name: int) -> None:
        for n in range(200):
            log.emit("step", thread=name, n=n, filler="y" * 300)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    tail = Tail(tmp_path)
    events = [e for e in tail.poll() if e["kind"] == "step"]
    assert tail.unreadable == 0
    assert sorted((e["thread"], e["n"]) for e in events) == [(t, n) for t in range(4) for n in range(200)]


ENDS = {
    "return": ("return None", 0, ""),
    "code": ("return 4", 4, ""),
    "typed": ("raise DataError('expected a, found b; do c')", 3, "DataError (exit 3)\n  expected a, found b; do c"),
    "interrupt": ("raise KeyboardInterrupt", 130, "interrupted"),
    "bug": ("raise ZeroDivisionError('oops')", 1, "Traceback"),
    "usage": ("raise SystemExit(2)", 2, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_its_code_its_words_and_its_record(tmp_path: Path, end: str) -> None:
    body, code, words = ENDS[end]
    script = f"from orz_async.errors import *\nfrom orz_async.observe.process import run_main\ndef f():\n    {body}\n"
    script += "run_main(f, process='learner-0')\n"
    env = os.environ | {"ORZ_EXIT_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert words in done.stderr
    assert ("Traceback" in done.stderr) == (end == "bug")
    (record,) = read_records(tmp_path, "learner")
    assert (record.process, record.code) == ("learner-0", code)
    assert (words in record.message) or end == "bug"
    assert read_records(tmp_path, "learn") == []


def test_sigusr1_prints_every_stack_and_the_process_goes_on() -> None:
    script = (
        "import sys, time\nfrom orz_async.observe.process import run_main\ndef waiting_here():\n"
        "    print('up', flush=True)\n    sys.stdin.read()\nrun_main(waiting_here, process='x')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert any("waiting_here" in process.stderr.readline() for _ in range(10))
        process.stdin.close()
        assert process.wait(timeout=10) == 0
