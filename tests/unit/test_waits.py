"""Every wait is bounded, and says what it waits for, from whom, since when; who gives up says what all threads did."""

from __future__ import annotations

import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from broker_fakes import FakeGenerator, make_broker, small_config
from test_broker import wait_until

from orz_async.broker import server, service
from orz_async.errors import DiskError, PeerLostError
from orz_async.learner.parallel import _peers
from orz_async.observe.events import EventLog
from orz_async.observe.history import History
from orz_async.observe.process import dump_stacks
from orz_async.observe.tail import Tail
from orz_async.observe.words import waiting


def test_a_late_batch_is_reported_to_the_live_view_and_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_WAITING_S", 0.1)
    monkeypatch.setattr(service, "_LOGGED_S", 0.3)
    broker = make_broker(tmp_path, small_config(lease_s=30.0))
    broker._events = events = EventLog(tmp_path / "events" / "broker.jsonl", "broker")
    broker.start()
    history, tail = History(), Tail(tmp_path / "events")

    def shown() -> str:
        history.feed_all(tail.poll())
        return waiting(history, time.time())

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as learner:
        batch = learner.submit(broker.take, 0)
        wait_until(lambda: "no generator is connected" in shown())
        assert re.fullmatch(
            r"step 0 waits for rollouts: 4 granted to nobody \(no generator is connected\); no progress for \d+\.\d s",
            shown(),
        )
        wait_until(lambda: "step 0 waits for rollouts" in caplog.text)
        with FakeGenerator(broker.address, "a") as a:
            a.mute = True
            broker.published(0)
            wait_until(lambda: "4 from a" in shown())
            a.mute = False
            batch.result(timeout=30)
            broker.close(finished=True, reason="done")
    events.close()


def test_a_stuck_broker_thread_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = make_broker(tmp_path, small_config())
    broker.start()
    go = threading.Event()
    monkeypatch.setattr(server, "_CALL_S", 0.1)
    with pytest.raises(DiskError, match="expected the broker's thread to answer"):
        broker._call(lambda: go.wait(30))
    go.set()
    monkeypatch.setattr(server, "_CALL_S", 30.0)
    broker.close(finished=False, reason="the test is over")


def test_the_stacks_of_all_threads_are_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    go = threading.Event()
    helper = threading.Thread(target=go.wait)
    helper.start()
    try:
        raise PeerLostError("expected somebody, found nobody")
    except PeerLostError as error:
        dump_stacks(error)
    finally:
        go.set()
        helper.join()
    told = capfd.readouterr().err
    assert "PeerLostError: expected somebody, found nobody" in told
    assert "test_the_stacks_of_all_threads" in told
    assert told.count("most recent call first") >= 2, "a thread is missing"


def test_a_collective_that_fails_is_a_lost_peer() -> None:
    told = "rank 3 expected every rank to add within 600 s, found one gone: gloo"
    with pytest.raises(PeerLostError, match=told), _peers(3, "add"):
        raise RuntimeError("gloo: connection reset by peer")
