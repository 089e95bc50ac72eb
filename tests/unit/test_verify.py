"""`orz verify`: true of a real run, and every planted corruption is found and named."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from broker_fakes import FakeGenerator, make_broker, small_config
from test_broker import wait_until

from orz_async import cli
from orz_async.broker import recovery
from orz_async.broker.segments import (
    HEADER_BYTES,
    Record,
    encode_header,
    encode_record,
    name_of,
    records,
    segment_files,
)
from orz_async.broker.transitions import Ended, Granted, Restarted, Taken
from orz_async.broker.verify import verify
from orz_async.broker.wire import run_hash
from orz_async.config_toml import to_toml
from orz_async.errors import BrokenPromiseError, ConfigError
from orz_async.observe.events import EventLog
from orz_async.records import Span, Trajectory

STEPS, RESUMED = 6, 2


def live(run_dir: Path, events: EventLog, epoch: int, steps: range) -> None:
    """One life of a learner without a model."""
    config = small_config(max_lag=1)
    snapshot = run_dir / "snapshot"
    start = recovery.ResumePoint(snapshot.read_bytes(), RESUMED) if snapshot.exists() else None
    broker = make_broker(run_dir, config, epoch=epoch, start=start)
    broker._events = broker_events = EventLog(run_dir / "events" / "broker.jsonl", "broker")
    ledger = {"rollouts_per_step": 4, "max_lag": 1, "window": 0, "steps": STEPS}
    events.emit("run", run_id="run-a", resumed_step=steps.start or None, epoch=epoch, notes=[], ledger=ledger)
    broker.start()
    with FakeGenerator(broker.address, "a") as a, FakeGenerator(broker.address, "b", slots=3) as b:
        broker.published(steps.start)
        for step in steps:
            batch = broker.take(step)
            events.emit("step", step=step, lag_max=step - min(t.version_first for t in batch), rollouts=len(batch))
            a.mute = b.mute = steps.stop < STEPS and step + 1 == steps.stop
            broker.published(step + 1)
            if step + 1 == RESUMED and start is None:
                snapshot.write_bytes(broker.snapshot())
        if a.mute:  # so that the restart has leases to end
            wait_until(lambda: bool(a.leases or b.leases))
        broker.close(finished=steps.stop == STEPS, reason="done")
    broker_events.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose learner was lost after step 4 and resumed from step 2."""
    run_dir = tmp_path_factory.mktemp("verified") / "run"
    events = EventLog(run_dir / "events" / "learner-0.jsonl", "learner-0")
    live(run_dir, events, 1, range(4))
    live(run_dir, events, 2, range(RESUMED, STEPS))
    events.close()
    (run_dir / "config.toml").write_text(to_toml(small_config(max_lag=1)))
    return run_dir


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    for path in original.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(original)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def journal(run: Path) -> list[Record]:
    return [record for _, record, _ in records(run / "journal")]


def rewrite(run: Path, entries: list[Record], start: int = 0) -> None:
    """The same journal with other records, whole and with right checksums; the first one is record `start`."""
    for _, path in segment_files(run / "journal"):
        path.unlink()
    parts = [part for entry in entries for part in encode_record(entry)]
    (run / "journal" / name_of(start)).write_bytes(encode_header(run_hash("run-a"), start) + b"".join(parts))


def first(entries: list[Record], wanted: Callable[[Record], bool]) -> int:
    return next(i for i, entry in enumerate(entries) if wanted(entry))


def problems(run: Path) -> list[str]:
    return [str(finding) for finding in verify(run).findings]


def test_a_resumed_run_keeps_its_promises(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(run)
    assert result.findings == []
    assert (result.steps, result.trained, result.in_flight, result.lives) == (STEPS, 4 * STEPS, 0, 2)
    assert result.granted == result.trained + sum(result.expired.values()) + result.quarantined
    assert result.expired.get("learner_restart", 0) > 0, "the restart ended nothing"
    assert set(result.tokens_by_lag) <= {0, 1}
    assert result.max_lag == 1
    assert cli.dispatch(["verify", str(run)]) == 0
    assert "24 trained" in capsys.readouterr().out
    assert cli.dispatch(["verify", "--json", str(run)]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)["trained"] == 4 * STEPS


def test_old_runs_take_their_bounds_from_the_configuration(run: Path) -> None:
    log = run / "events" / "learner-0.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"kind":"run"' not in line))
    result = verify(run)
    assert (result.bounds.max_lag, result.bounds.rollouts_per_step, result.planned) == (1, 4, 6)


def test_no_journal_is_a_question_not_a_verdict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no journal"):
        verify(tmp_path)


def test_a_run_that_goes_on_has_rollouts_in_flight_and_loses_none(run: Path) -> None:
    entries = journal(run)
    cut = first(entries, lambda e: isinstance(e, Taken) and e.step == 3)
    rewrite(run, entries[:cut])
    log = run / "events" / "learner-0.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"step":' not in line))
    result = verify(run)
    assert result.findings == []
    assert (result.finished, result.lost) == (False, 0)
    assert result.in_flight > 0


def drop_grant(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Granted))
    granted = entries[at]
    assert isinstance(granted, Granted)
    entries[at] = Granted(granted.generator, granted.terms[1:])
    return granted.terms[0].rollout


def drop_result(entries: list[Record]) -> int:
    taken = next(e for e in entries if isinstance(e, Taken))
    del entries[first(entries, lambda e: isinstance(e, Trajectory) and e.rollout == taken.rollouts[1])]
    return taken.rollouts[1]


def twice_the_batch(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Taken))
    taken = entries[at]
    assert isinstance(taken, Taken)
    entries.insert(at + 1, taken)
    return taken.rollouts[0]


def twice_in_two_steps(entries: list[Record]) -> int:
    before = next(e for e in entries if isinstance(e, Taken) and e.step == 4)
    at = first(entries, lambda e: isinstance(e, Taken) and e.step == 5)
    taken = entries[at]
    assert isinstance(taken, Taken)
    entries[at] = Taken(5, (before.rollouts[2], *taken.rollouts[1:]))
    return before.rollouts[2]


def twice_the_result(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Trajectory) and e.kind == "train")
    result = entries[at]
    assert isinstance(result, Trajectory)
    entries.insert(at + 1, result)
    return result.rollout


def stale(entries: list[Record]) -> int:
    taken = next(e for e in entries if isinstance(e, Taken) and e.step == 5)
    at = first(entries, lambda e: isinstance(e, Trajectory) and e.rollout == taken.rollouts[0])
    result = entries[at]
    assert isinstance(result, Trajectory)
    entries[at] = msgspec.structs.replace(result, spans=(Span(3, 0),))
    return result.rollout


def from_the_future(entries: list[Record]) -> int:
    taken = next(e for e in entries if isinstance(e, Taken) and e.step == 1)
    at = first(entries, lambda e: isinstance(e, Trajectory) and e.rollout == taken.rollouts[0])
    result = entries[at]
    assert isinstance(result, Trajectory)
    entries[at] = msgspec.structs.replace(result, spans=(Span(2, 0),))
    return result.rollout


def another_holder(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Trajectory) and e.kind == "train")
    result = entries[at]
    assert isinstance(result, Trajectory)
    entries[at] = msgspec.structs.replace(result, generator="mallory")
    return result.rollout


def other_batch_after_the_restart(entries: list[Record]) -> int:
    restart = [i for i, e in enumerate(entries) if isinstance(e, Restarted)][-1]
    at = restart + first(entries[restart:], lambda e: isinstance(e, Taken))
    taken = entries[at]
    assert isinstance(taken, Taken) and taken.step == RESUMED
    entries[at] = Taken(taken.step, (taken.rollouts[0] + 1000, *taken.rollouts[1:]))
    return taken.rollouts[0]


def a_batch_too_small(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Taken) and e.step == 5)
    taken = entries[at]
    assert isinstance(taken, Taken)
    entries[at] = Taken(5, taken.rollouts[:-1])
    return taken.rollouts[-1]


def an_end_without_a_holder(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Trajectory) and e.kind == "train")
    result = entries[at]
    assert isinstance(result, Trajectory)
    ref = recovery.LeaseRef("train", result.rollout, result.attempt)
    entries.insert(at + 1, Ended(result.generator, ref, "deadline", True, ""))
    return result.rollout


def a_grant_of_what_is_held(entries: list[Record]) -> int:
    at = first(entries, lambda e: isinstance(e, Granted))
    granted = entries[at]
    assert isinstance(granted, Granted)
    again = msgspec.structs.replace(granted.terms[0], attempt=1)
    entries.insert(at + 1, Granted("b", (again,)))
    return again.rollout


CORRUPTIONS = [
    (drop_grant, "no grant is in the journal"),
    (drop_result, "no accepted trajectory"),
    (twice_the_batch, "taken twice without a restart: trained twice"),
    (twice_in_two_steps, "trained twice: by step 4 and by step 5"),
    (twice_the_result, "was accepted after attempt"),
    (stale, "lag 2, S is 1"),
    (from_the_future, "lag -1, S is 1"),
    (another_holder, "by mallory"),
    (other_batch_after_the_restart, "has other rollouts after the restart"),
    (a_batch_too_small, "lost: accepted and never trained"),
    (an_end_without_a_holder, "after attempt 0 was accepted"),
    (a_grant_of_what_is_held, "was granted while"),
]


@pytest.mark.parametrize(("corrupt", "told"), CORRUPTIONS, ids=[c.__name__ for c, _ in CORRUPTIONS])
def test_a_planted_corruption_is_found_and_the_rollout_named(
    run: Path, corrupt: Callable[[list[Record]], int], told: str
) -> None:
    entries = journal(run)
    rollout = corrupt(entries)
    rewrite(run, entries)
    found = verify(run)
    naming = [f for f in found.findings if f.rollout == rollout and told in f.problem]
    assert naming, [str(f) for f in found.findings]
    with pytest.raises(BrokenPromiseError, match=f"rollout {rollout}: ") as caught:
        cli.dispatch(["verify", str(run)])
    assert caught.value.exit_code == 12


def test_any_flipped_byte_is_found(run: Path) -> None:
    files = [path for _, path in segment_files(run / "journal")]
    rng = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        places = {0, HEADER_BYTES - 1, HEADER_BYTES, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))}
        for place in sorted(p for p in places if p < len(whole)):
            data = bytearray(whole)
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            assert verify(run).findings, f"byte {place} of {path.name}"
        path.write_bytes(whole)
    assert verify(run).findings == []


def test_a_torn_tail_is_no_damage_while_the_run_goes_on(run: Path) -> None:
    log = run / "events" / "learner-0.jsonl"
    kept = [line for line in log.read_text().splitlines(True) if '"step":5' not in line]
    log.write_text("".join(kept))
    path = segment_files(run / "journal")[-1][1]
    os.truncate(path, path.stat().st_size - 3)
    result = verify(run)
    assert result.findings == []
    assert any("a process died in a write" in note for note in result.notes)


def test_retention_leaves_a_journal_that_still_verifies(run: Path) -> None:
    segment_files(run / "journal")[0][1].unlink()
    result = verify(run)
    assert result.findings == []
    assert "deleted by retention" in result.notes[0]


def test_a_journal_verifies_wherever_retention_cut_it(run: Path) -> None:
    entries = journal(run)
    # A rollout granted again just behind the cut, whose first grant and those of others lie before it.
    for start in range(1, len(entries)):
        rewrite(run, entries[start:], start)
        assert problems(run) == [], f"cut before record {start}: {entries[start]}"


def test_a_step_that_the_journal_does_not_know(run: Path) -> None:
    with (run / "events" / "learner-0.jsonl").open("a") as log:
        log.write('{"v":1,"t":9e9,"m":9e9,"process":"learner-0","kind":"step","step":6,"lag_max":0}\n')
    assert problems(run) == ["step 6 was reported, but the journal has no batch for it"]


def test_the_broker_counts_what_the_journal_says(run: Path) -> None:
    log = run / "events" / "broker.jsonl"
    log.write_text(log.read_text().replace('"trained":24', '"trained":23'))
    assert any("the broker counted" in problem for problem in problems(run))


def test_a_reported_lag_that_is_not_the_true_one(run: Path) -> None:
    log = run / "events" / "learner-0.jsonl"
    log.write_text(log.read_text().replace('"step":0,"lag_max":0', '"step":0,"lag_max":1'))
    assert problems(run) == ["step 0 reported lag 1, the journal says 0"]
