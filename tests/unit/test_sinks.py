"""Sinks are extras: slow, broken, killed or pointed at nothing, they lose points and count them, and hold nobody."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic_run import write_run
from orz_async.config import Config, ObserveConfig
from orz_async.config_toml import load, to_toml
from orz_async.errors import ConfigError
from orz_async.observe.events import EventLog
from orz_async.observe.sinks.feed import Feed
from orz_async.observe.sinks.process import sinks
from orz_async.observe.sinks.scalars import Point, Scalars
from orz_async.observe.sinks.writers import configured

PATIENCE_S = 60.0
POINT = Point(1, {"a": 1.0})


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited for a condition in vain"
        time.sleep(0.02)
    return value


class Stuck:
    """A service that answers when it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.got: list[Point] = []

    def write(self, point: Point) -> None:
        self.free.wait(PATIENCE_S)
        self.got.append(point)

    def close(self) -> None:
        self.free.wait(PATIENCE_S)


def test_a_stuck_service_costs_points_not_time() -> None:
    stuck = Stuck()
    feed = Feed("stuck", lambda: stuck, capacity=3)
    feed.offer(POINT)
    wait_for(lambda: feed._queue.empty())  # the first one is in the service's hands
    for _ in range(10):
        feed.offer(POINT)
    assert feed.dropped == 7
    feed.close(patience_s=0.0)
    assert (feed.delivered, feed.dropped) == (0, 10)
    stuck.free.set()


def test_what_is_queued_is_delivered_at_the_end() -> None:
    stuck = Stuck()
    feed = Feed("slow", lambda: stuck, capacity=10)
    for step in range(5):
        feed.offer(Point(step, {}))
    stuck.free.set()
    feed.close(PATIENCE_S)
    assert [point.step for point in stuck.got] == list(range(5))
    assert (feed.delivered, feed.dropped, feed.failure) == (5, 0, "")


@pytest.mark.parametrize("where", ["make", "write"])
def test_a_broken_service_ends_alone_and_says_why(where: str) -> None:
    class Broken(Stuck):
        def write(self, point: Point) -> None:
            raise ConnectionError("nobody there")

    def make() -> Broken:
        if where == "make":
            raise ConnectionError("nobody there")
        return Broken()

    feed = Feed("broken", make, capacity=10)
    feed.offer(POINT)
    wait_for(lambda: feed.failure)
    assert feed.failure == "ConnectionError: nobody there"
    feed.offer(POINT)
    feed.close(PATIENCE_S)
    assert feed.delivered == 0 and feed.dropped >= 1


def test_events_become_numbers_by_path() -> None:
    scalars = Scalars()
    step = {"kind": "step", "process": "learner-0", "t": 1.0, "step": 4, "reward_mean": 0.5, "policy": {"loss": -1}}
    assert scalars.point(step | {"notes": "x", "lr": float("nan")}) == Point(
        5, {"train/reward_mean": 0.5, "train/policy/loss": -1.0}
    )
    speed = {"kind": "throughput", "process": "generator-g0", "t": 2.0, "tokens_s": 7}
    assert scalars.point(speed) == Point(5, {"generator-g0/throughput/tokens_s": 7.0})
    assert scalars.point({"kind": "timeline", "process": "x", "t": 2.0, "seconds": {"a": 1}}) is None


@pytest.mark.parametrize("address", ["0.0.0.0:9000", "9000", "127.0.0.1:http", "127.0.0.1:0"])
def test_only_loopback_is_scraped(address: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:PORT"):
        ObserveConfig(prometheus=address)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that goes on, whose sinks scrape."""
    folder = tmp_path / "run"
    write_run(folder, steps=2, prompts=4, samples=2)
    yield folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def configure(folder: Path, **observe: Any) -> Config:
    import dataclasses

    config = dataclasses.replace(load(folder / "config.toml"), observe=ObserveConfig(**observe))
    (folder / "config.toml").write_text(to_toml(config))
    return config


def reports(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "events" / "sinks.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event.get("kind") == "sink" and event["name"] == name]


def test_the_newest_numbers_are_scraped_and_a_missing_package_is_told(run: Path) -> None:
    port = free_port()
    config = configure(run, prometheus=f"127.0.0.1:{port}", wandb="nowhere")
    log = EventLog(run / "events" / "learner-0.jsonl", "learner-0")
    with sinks(config.observe, run, log):
        wait_for(lambda: reports(run, "prometheus"))
        log.emit("step", step=41, reward_mean=0.625)
        url = f"http://127.0.0.1:{port}/metrics"

        def scraped() -> bool:
            try:
                text = urllib.request.urlopen(url, timeout=5).read().decode()
            except OSError:
                return False
            return "orz_train_reward_mean 0.625" in text and "orz_step 42.0" in text

        wait_for(scraped)
    log.close()
    wait_for(lambda: reports(run, "prometheus")[-1]["delivered"] == 1)
    assert "ModuleNotFoundError" in wait_for(lambda: reports(run, "wandb")[-1]["failure"])


def test_a_run_that_is_continued_goes_on_in_the_same_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The services' clients are played: what they were asked for is what matters."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for service in ("wandb", "trackio"):
        module = types.ModuleType(service)
        module.init = functools.partial(lambda of, **asked: calls.append((of, asked)), service)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, service, module)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    config = Config(observe=ObserveConfig(wandb="orz", trackio="orz"))
    for folder in (*folders, folders[0]):
        for make in configured(config, folder).values():
            make()
    ids = [asked["id"] for of, asked in calls if of == "wandb"]
    assert ids[0] == ids[2] != ids[1]
    names = [asked["name"] for of, asked in calls if of == "trackio"]
    assert names[0] == names[2] == f"a-{ids[0][:6]}"
    assert [asked["resume"] for _, asked in calls] == ["allow"] * 6


def test_killed_sinks_are_not_missed(run: Path) -> None:
    config = configure(run, prometheus=f"127.0.0.1:{free_port()}")
    log = EventLog(run / "events" / "learner-0.jsonl", "learner-0")
    with sinks(config.observe, run, log):
        lines = (run / "events" / "learner-0.jsonl").read_text().splitlines()
        [pid] = [event["pid"] for event in map(json.loads, lines) if event["kind"] == "sinks_started"]
        os.kill(pid, signal.SIGKILL)
        log.emit("step", step=1)
    log.close()


def test_sinks_end_when_whoever_started_them_is_killed(run: Path) -> None:
    configure(run, prometheus=f"127.0.0.1:{free_port()}")
    code = (
        "import sys, time; from pathlib import Path; from orz_async.observe.sinks.process import sinks;"
        "from orz_async.observe.events import EventLog; from orz_async.config_toml import load;"
        "run = Path(sys.argv[1]); log = EventLog(run / 'events' / 'learner-0.jsonl', 'learner-0');"
        "sinks(load(run / 'config.toml').observe, run, log).__enter__(); print('up', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE)
    assert starter.stdout is not None and starter.stdout.readline() == b"up\n"
    lines = (run / "events" / "learner-0.jsonl").read_text().splitlines()
    [pid] = [event["pid"] for event in map(json.loads, lines) if event["kind"] == "sinks_started"]
    wait_for(lambda: reports(run, "prometheus"))
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_for(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from orz_async.observe.sinks.writers import TensorBoard

    writer = TensorBoard(tmp_path)
    for step in range(3):
        writer.write(Point(step, {"train/reward_mean": step / 4}))
    writer.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(s.step, s.value) for s in read.Scalars("train/reward_mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
