"""The token sample: bounded, what the learner computed, whole after any death."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orz_async.observe.tokens import StepTokens, TokenLog, read_tokens
from orz_async.records import float32_bytes, int32_bytes


def tokens(step: int, lengths: list[int], fill: float = 0.0) -> StepTokens:
    column = float32_bytes(np.full(sum(lengths), fill))
    return StepTokens(step, int32_bytes(range(len(lengths))), int32_bytes(lengths), column, column, column, column)


def write(folder: Path, epoch: int, steps: range, fill: float) -> None:
    log = TokenLog(folder, epoch)
    for step in steps:
        log.append(tokens(step, [2, 3], fill))
    log.close()


def test_a_repeated_step_is_read_from_the_later_life(tmp_path: Path) -> None:
    write(tmp_path, 1, range(5), 1.0)
    write(tmp_path, 2, range(5, 5), 2.0)  # died before its first step
    write(tmp_path, 3, range(3, 7), 3.0)
    found = [(t.step, float(next(t.columns())[1]["values"][0])) for t in read_tokens(tmp_path)]
    assert found == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0), (6, 3.0)]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_record_hides_only_itself(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 1, range(3), 1.0)
    path = tmp_path / "tokens-000001.orzt"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [t.step for t in read_tokens(tmp_path)] == [0, 1]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    write(tmp_path, 1, range(1), 1.0)
    path = tmp_path / "tokens-000001.orzt"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert list(read_tokens(tmp_path)) == []


def test_lengths_that_do_not_fit_are_refused() -> None:
    good = tokens(0, [2, 3])
    assert [len(columns["gaps"]) for _, columns in good.columns()] == [2, 3]
    with pytest.raises(ValueError, match="other lengths"):
        list(StepTokens(0, good.rollouts, int32_bytes([2, 4]), *[good.values] * 4).columns())
