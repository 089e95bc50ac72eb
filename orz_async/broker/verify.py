"""`orz verify`: what a run promised, recomputed from its journal and event logs alone.

consumes  RUN/journal, RUN/events (of old runs also RUN/config.toml, for S, W and B)
produces  a Verification: the funnel with causes, tokens by lag, and every finding with the rollout it is about
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from orz_async.broker.checker import Bounds, Checker, Finding
from orz_async.broker.segments import HEADER_BYTES, decode_body, is_damaged, run_of, scan, segment_files
from orz_async.config_toml import load
from orz_async.errors import ConfigError, DiskError
from orz_async.observe.history import History
from orz_async.observe.tail import Tail


@dataclass(slots=True)
class Verification:
    bounds: Bounds
    steps: int
    """Learner steps that are trained for good: a step repeated after a resume counts once."""
    planned: int
    records: int = 0
    segments: int = 0
    journal_bytes: int = 0
    first_record: int = 0
    lives: int = 0
    granted: int = 0
    trained: int = 0
    expired: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0
    in_flight: int = 0
    lost: int = 0
    trained_twice: int = 0
    tokens_by_lag: dict[int, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.steps >= self.planned

    @property
    def max_lag(self) -> int:
        return max(self.tokens_by_lag, default=0)


def verify(run_dir: Path) -> Verification:
    """ConfigError if the folder holds no journal; what is wrong with the run itself is in `findings`."""
    files = segment_files(run_dir / "journal")
    if not files:
        raise ConfigError(f"expected the folder of a run, found no journal in {run_dir}/journal; check the path")
    history = History()
    ledgers: list[dict[str, Any]] = []
    for event in Tail(run_dir / "events").poll():
        history.feed(event)
        if event["kind"] == "run" and isinstance(event.get("ledger"), dict):
            ledgers.append(event["ledger"])
    bounds, planned = _bounds(run_dir, ledgers)
    result = Verification(bounds, history.steps_done, planned, segments=len(files), first_record=files[0][0])
    checker = Checker(bounds, partial=files[0][0] > 0)
    if checker.partial:
        result.notes.append(f"records 0 to {files[0][0] - 1} were deleted by retention: only the rest is verified")
    _read(files, checker, result)
    _conclude(checker, result)
    _compare(checker, history, result)
    return result


def _bounds(run_dir: Path, ledgers: list[dict[str, Any]]) -> tuple[Bounds, int]:
    if ledgers:
        found = ledgers[-1]
        return Bounds(found["rollouts_per_step"], found["max_lag"], found["window"]), int(found["steps"])
    config = load(run_dir / "config.toml")
    broker = config.broker
    return Bounds(broker.rollouts_per_step, broker.max_lag, broker.window), config.steps


def _read(files: list[tuple[int, Path]], checker: Checker, result: Verification) -> None:
    """Every record, and whether something lies between or behind them that no crash explains."""
    result.lives = 0
    expected = files[0][0]
    for start, path in files:
        is_last = path == files[-1][1]
        if start != expected:
            result.findings.append(
                Finding(
                    f"{path.name} begins with record {start}: {expected} to {start - 1} are missing", record=expected
                )
            )
            return
        size = path.stat().st_size
        result.journal_bytes += size
        try:
            if run_of(path) is None:
                if size > HEADER_BYTES or not is_last:
                    result.findings.append(Finding(f"the header of {path.name} is damaged", record=start))
                continue
            end = HEADER_BYTES
            for location, body in scan(path):
                checker.feed(expected, decode_body(body))
                expected, end = expected + 1, location.end
        except DiskError as error:
            result.findings.append(Finding(str(error), record=expected))
            return
        result.records = expected - files[0][0]
        if end < size:
            _tail(path, end, size, is_last and not result.finished, expected, result)


def _tail(path: Path, end: int, size: int, may_be_torn: bool, expected: int, result: Verification) -> None:
    if may_be_torn and not is_damaged(path, end):
        result.notes.append(f"{size - end} bytes of an unfinished record end {path.name}: a process died in a write")
    else:
        told = f"{path.name} is damaged at byte {end}: {size - end} bytes behind it cannot be read"
        result.findings.append(Finding(told, record=expected))


def _conclude(checker: Checker, result: Verification) -> None:
    """The funnel: granted = trained + expired + quarantined + in flight."""
    result.findings = [*checker.findings, *result.findings]
    result.lives, result.granted, result.quarantined = checker.lives, checker.granted, checker.quarantined
    result.expired = dict(sorted(checker.expired.items()))
    tokens: Counter[int] = Counter()
    for step, batch in checker.batches.items():
        if step < result.steps:
            result.trained += len(batch.rollouts)
            tokens += batch.tokens_by_lag
    result.tokens_by_lag = dict(sorted(tokens.items()))
    result.in_flight = result.granted - result.trained - sum(checker.expired.values()) - result.quarantined
    result.trained_twice = sum("trained twice" in finding.problem for finding in result.findings)
    if result.finished:
        for number, rollout in sorted(checker.open.items()):
            state = "accepted and never trained" if rollout.tokens else "granted, and neither trained nor ended"
            state = state if rollout.tokens or rollout.generator else "ended, and never granted again"
            result.findings.append(Finding(f"lost: {state}, at the end of a finished run", number))
    result.lost = sum("lost" in f.problem or "no accepted trajectory" in f.problem for f in result.findings)


def _compare(checker: Checker, history: History, result: Verification) -> None:
    """The event logs must tell the same story."""
    for step in range(result.steps):
        batch, event = checker.batches.get(step), history.steps.get(step)
        if batch is None:
            if not checker.partial or step >= min(checker.batches, default=0):
                result.findings.append(Finding(f"step {step} was reported, but the journal has no batch for it"))
            continue
        if event is None:
            result.notes.append(f"step {step} is in the journal and not in the event log")
            continue
        lag, reported = max(batch.tokens_by_lag, default=0), int(event.get("lag_max") or 0)
        if batch.whole and lag != reported:
            result.findings.append(Finding(f"step {step} reported lag {reported}, the journal says {lag}"))
    funnel = history.funnel
    if result.finished and not checker.partial and funnel and not result.findings:
        told = {name: int(funnel.get(name) or 0) for name in ("granted", "trained", "quarantined", "in_flight")}
        mine = {name: getattr(result, name) for name in told}
        if told != mine or dict(funnel.get("expired") or {}) != result.expired:
            result.findings.append(Finding(f"the broker counted {told}, the journal says {mine}"))


def to_json(result: Verification) -> str:
    found = msgspec.to_builtins(result, str_keys=True) | {"finished": result.finished, "max_lag": result.max_lag}
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()


def lines(result: Verification) -> list[tuple[str, str]]:
    """What is printed: name and value."""
    bounds = result.bounds
    causes = ", ".join(f"{cause} {n:,}" for cause, n in result.expired.items())
    expired = f"{sum(result.expired.values()):,} expired" + (f" ({causes})" if causes else "")
    by_lag = ", ".join(f"lag {lag} {tokens:,}" for lag, tokens in result.tokens_by_lag.items())
    state = "finished" if result.finished else "not finished"
    return [
        ("journal", f"{result.records:,} records, {result.segments} files, {result.journal_bytes / 1e6:.1f} MB"),
        ("promised", f"S = {bounds.max_lag}, W = {bounds.window}, B = {bounds.rollouts_per_step}"),
        ("steps", f"{result.steps:,} of {result.planned:,}, {state}; the learner began {result.lives} times"),
        (
            "rollouts",
            f"{result.granted:,} granted = {result.trained:,} trained + {expired} + "
            f"{result.quarantined:,} quarantined + {result.in_flight:,} in flight",
        ),
        ("promises", f"lost {result.lost}, trained twice {result.trained_twice}"),
        ("tokens", f"{by_lag or 'none trained'}; max lag {result.max_lag}, allowed {bounds.max_lag}"),
    ]
