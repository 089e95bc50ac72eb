"""Hard prompts: exactly those solved in less than the given share, judged only with enough samples."""

from __future__ import annotations

import json
from pathlib import Path

import learner_kit as kit
import msgspec
import numpy as np
import pytest

from orz_async.data.files import read_problems
from orz_async.data.hard import Tally, hard_problems, tally, write
from orz_async.data.source import prompt_id
from orz_async.errors import DataError
from orz_async.records import Trajectory


def rollouts(text: str, solved: int, samples: int) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [kit.trajectory(rng, n, prompt_id=prompt_id(text), reward=float(n < solved)) for n in range(samples)]


def test_prompts_solved_rarely_are_found_and_can_be_trained_on(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    names = ["never", "rarely", "at the limit", "often", "unseen", "too few"]
    train.write_text("".join(json.dumps({"prompt": name, "answer": name[0]}) + "\n" for name in names))
    journal = [
        *rollouts("often", 6, 8),
        *rollouts("never", 0, 8),
        *rollouts("rarely", 3, 16),
        *rollouts("at the limit", 2, 8),
        *rollouts("too few", 0, 4),
        *[msgspec.structs.replace(t, kind="eval") for t in rollouts("too few", 0, 8)],
    ]
    tallies = tally(journal)
    assert tallies[prompt_id("rarely")] == Tally(3, 16)
    found = hard_problems(train, tallies, below=2, of=8)
    assert [problem.text for problem, _ in found] == ["never", "rarely"]
    write(tmp_path / "hard.jsonl", found)
    assert read_problems(tmp_path / "hard.jsonl") == [problem for problem, _ in found]
    with pytest.raises(DataError, match="fewer than 1 of 16"):
        hard_problems(train, tally(rollouts("often", 6, 8)), below=1, of=16)
    with pytest.raises(DataError, match=r"has data\.train changed"):
        hard_problems(train, tally(rollouts("from elsewhere", 0, 8)), below=2, of=8)
