"""A sample of rollouts: their text from the journal, their values from the token sample, within a number of bytes.

The journal is walked from record to record without decoding what is not wanted. Wanted are rollouts of the token sample
and others, by a hash of their number: any part of them is a fair sample.
"""

from __future__ import annotations

import base64
import heapq
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from orz_async.broker.segments import HEADER_BYTES, MAX_BODY, Location, decode_body, load, run_of, segment_files
from orz_async.broker.transitions import Taken
from orz_async.errors import DiskError
from orz_async.observe.tokens import read_tokens
from orz_async.records import Kind, Trajectory, as_float32, as_int32
from orz_async.report.pieces import Pieces

MOST_ROLLOUTS = 10_000
MOST_BYTES = 12 << 20
"""Of all rollouts of all runs of one page, as they stand in it."""
MOST_WALKED = 32 << 30
"""Bytes of journal that are walked; of a longer one whole segments are left out, evenly."""

CHANNELS = ("value", "advantage", "log_ratio", "gap", "logprob")
_HEAD = struct.Struct("<II")
_WIDTHS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
"""Bytes after the tag of an unsigned number in MessagePack; a smaller tag is the number itself."""


class Found(NamedTuple):
    kind: Kind
    rollout: int
    location: Location


def lot(kind: Kind, rollout: int) -> int:
    """32 bits that order rollouts as if by chance, always in the same way."""
    x = (rollout * 2 + (kind == "eval") + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return x >> 32


@dataclass(slots=True)
class Sample:
    """What was found, and how much there was."""

    found: dict[Kind, dict[int, Found]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    steps: dict[int, int] = field(default_factory=dict)
    """By training rollout of `found`: the step that took it."""
    accepted: int = 0
    """Trajectories in the segments that were walked."""
    segments: int = 0
    walked: int = 0
    """Segments that were walked."""
    damaged: list[str] = field(default_factory=list)
    """Files whose rest could not be read."""


def walk(folder: Path, wanted: frozenset[int], most: int, sample: Sample) -> None:
    """Fill the sample: all training rollouts in `wanted`, and `most` others at most."""
    files = segment_files(folder)
    total = sum(path.stat().st_size for _, path in files)
    stride = max(1, -(-total // MOST_WALKED))
    sample.segments, others = len(files), _Lottery(most)
    for _, path in files[::stride]:
        sample.walked += 1
        _walk_segment(path, wanted, others, sample)


class _Lottery:
    """Keeps the `most` found with the smallest lots; who is pushed out is forgotten."""

    def __init__(self, most: int) -> None:
        self.limit = (1 << 32) - 1 if most else -1
        """A larger lot would be pushed out at once."""
        self._most = most
        self._held: list[tuple[int, Kind, int]] = []

    def offer(self, item: Found, found: dict[Kind, dict[int, Found]]) -> None:
        kind, rollout, _ = item
        number = -lot(kind, rollout)
        if rollout in found[kind]:
            found[kind][rollout] = item  # accepted again after a restart that had lost it
            return
        found[kind][rollout] = item
        heapq.heappush(self._held, (number, kind, rollout))
        if len(self._held) > self._most:
            _, kind, rollout = heapq.heappop(self._held)
            del found[kind][rollout]
        if len(self._held) == self._most:
            self.limit = -self._held[0][0]


def _walk_segment(path: Path, wanted: frozenset[int], others: _Lottery, sample: Sample) -> None:
    """Looks at kind and number of each record, a few dozen bytes; ends where the file is torn."""
    if run_of(path) is None:
        sample.damaged.append(path.name)
        return
    found, training, accepted = sample.found, sample.found["train"], 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position, end, unpack = HEADER_BYTES, len(data), _HEAD.unpack_from
        while position + 8 <= end:
            length, body = unpack(data, position)[0], position + 8
            position = body + length
            if not 0 < length <= MAX_BODY or position > end:
                sample.damaged.append(path.name)
                break
            if data[body] == 1 and length > 16:
                accepted += 1
                kind, rollout = _head(data, body + 2)
                if kind == "train" and rollout in wanted:
                    training[rollout] = Found(kind, rollout, Location(path, body, length))
                elif lot(kind, rollout) <= others.limit:
                    others.offer(Found(kind, rollout, Location(path, body, length)), found)
            elif data[body + 2 : body + 8] == b"\xa5Taken":
                record = decode_body(data[body:position])
                if isinstance(record, Taken):
                    sample.steps.update(dict.fromkeys(training.keys() & record.rollouts, record.step))
    sample.accepted += accepted


def _head(data: mmap.mmap, at: int) -> tuple[Kind, int]:
    """The first two fields of a trajectory in its MessagePack: "train" or "eval", and a number of up to 64 bits."""
    kind: Kind = "train" if data[at] == 0xA5 else "eval"
    at += 6 if kind == "train" else 5
    tag = data[at]
    if tag == 0xCE:
        return kind, int.from_bytes(data[at + 1 : at + 5], "big")
    return kind, int.from_bytes(data[at + 1 : at + 1 + _WIDTHS[tag]], "big") if tag in _WIDTHS else tag


def choose(run_dir: Path, granted: int, model_path: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """`rows` by column, `bodies` as JSON texts in the same order, and notes about what is shown."""
    by_step = {n: tokens.step for tokens in read_tokens(run_dir / "tokens") for n in _numbers(tokens.rollouts)}
    threshold = MOST_ROLLOUTS / 2 / max(1, len(by_step)) * 2**32
    wanted = frozenset(n for n in by_step if lot("train", n) < threshold)
    sample = Sample()
    walk(run_dir / "journal", wanted, MOST_ROLLOUTS - min(len(wanted), MOST_ROLLOUTS // 2), sample)
    sample.steps |= {n: step for n, step in by_step.items() if n in sample.found["train"]}
    columns = {
        rollout: arrays
        for tokens in read_tokens(run_dir / "tokens")
        for rollout, arrays in _columns(tokens)
        if rollout in sample.found["train"] and rollout in wanted
    }
    pieces = Pieces(model_path)
    shown: list[tuple[dict[str, Any], str]] = []
    spent = 0
    # Those with values and those without take turns, so that both are a fair sample whatever the bytes allow.
    every = [found for kind in sample.found.values() for found in kind.values()]
    order = sorted(every, key=lambda found: lot(found.kind, found.rollout))
    for found in order:
        trajectory = _load(found.location, sample)
        if trajectory is None:
            continue
        body = _body(trajectory, columns.get(found.rollout) if found.kind == "train" else None, pieces)
        if spent + len(body) > most_bytes and shown:
            break
        spent += len(body) + 60
        step = sample.steps.get(found.rollout) if found.kind == "train" else trajectory.version_first - 1
        shown.append((_row(trajectory, step, found.rollout in columns and found.kind == "train"), body))
    shown.sort(key=lambda pair: (pair[0]["step"] if pair[0]["step"] is not None else 1 << 60, pair[0]["rollout"]))
    return {
        "rows": {name: [row[name] for row, _ in shown] for name in (shown[0][0] if shown else {})},
        "bodies": [body for _, body in shown],
        "notes": _notes(sample, len(shown), sum(row["values"] for row, _ in shown), pieces, granted),
    }


def _numbers(data: bytes) -> list[int]:
    return [int(n) for n in np.frombuffer(data, "<i4")]


def _columns(tokens: Any) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    try:
        yield from tokens.columns()
    except ValueError:
        return  # not ours, or of another release: the rollouts are shown without values


def _load(location: Location, sample: Sample) -> Trajectory | None:
    try:
        return load(location)
    except (DiskError, AssertionError, OSError):
        sample.damaged.append(location.path.name)
        return None


def _row(trajectory: Trajectory, step: int | None, has_values: bool) -> dict[str, Any]:
    """What the list shows and filters by. `lag`: of the oldest token, when it was trained on; None before that."""
    train = trajectory.kind == "train"
    return {
        "kind": trajectory.kind,
        "rollout": trajectory.rollout,
        "step": None if step is None else step + 1,
        "reward": float(f"{trajectory.reward:.6g}"),
        "length": trajectory.num_response_tokens,
        "verdict": trajectory.verdict[:40],
        "lag": step - trajectory.version_first if step is not None and train else None,
        "finish": trajectory.finish,
        "values": has_values,
    }


def _body(trajectory: Trajectory, columns: dict[str, NDArray[np.float32]] | None, pieces: Pieces) -> str:
    count = trajectory.num_response_tokens
    channels = {"logprob": as_float32(trajectory.logprobs)}
    if columns is not None and len(columns["values"]) == count:
        names = {"value": "values", "advantage": "advantages", "log_ratio": "log_ratios", "gap": "gaps"}
        channels |= {name: columns[source] for name, source in names.items()}
    body = {
        "prompt": "".join(pieces(as_int32(trajectory.prompt).tolist())),
        "pieces": pieces(as_int32(trajectory.response).tolist()),
        "spans": [[span.version, span.start] for span in trajectory.spans],
        "prompt_id": trajectory.prompt_id[:80],
        "sample": trajectory.sample,
        "attempt": trajectory.attempt,
        "generator": trajectory.generator[:80],
        "seconds": round(trajectory.generate_s, 3),
        "channels": {name: half(values) for name, values in channels.items() if not np.isnan(values).all()},
    }
    return msgspec.json.encode(body).decode()


def half(values: NDArray[Any]) -> list[Any]:
    """[scale, base64]: numbers as whole multiples of scale in 16 bits; off by 1.5e-5 of the largest at most.

    -32768 stands for not-a-number.
    """
    values, finite = values.astype(np.float64), np.isfinite(values)
    scale = float(np.abs(values[finite]).max(initial=0.0)) / 32767 or 1.0
    scaled = np.where(finite, np.rint(np.where(finite, values, 0.0) / scale), -32768).astype("<i2")
    return [scale, base64.b64encode(scaled.tobytes()).decode()]


def _notes(sample: Sample, shown: int, with_values: int, pieces: Pieces, granted: int) -> list[str]:
    notes = []
    if sample.accepted:
        notes.append(f"{shown:,} of {sample.accepted:,} rollouts in the journal are shown, {with_values:,} with values")
    elif granted:
        notes.append("the journal is not there, or empty: no rollout can be shown")
    if sample.walked < sample.segments:
        notes.append(f"{sample.walked} of {sample.segments} journal files were read")
    if sample.damaged:
        notes.append(f"could not be read to the end: {', '.join(sorted(set(sample.damaged))[:5])}")
    if pieces.missing:
        notes.append(pieces.missing)
    return notes
