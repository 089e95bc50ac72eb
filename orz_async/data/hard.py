"""Hard prompts for a second stage: those a run solved in fewer than k of n samples, by its own journal.

Open-Reasoner-Zero trains its 32B model for a hundred more steps on the prompts solved fewer than 4 times of 64.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from orz_async.data.files import Problem, read_problems
from orz_async.data.source import prompt_id
from orz_async.errors import DataError, DiskError
from orz_async.records import Trajectory


class Tally(NamedTuple):
    solved: int
    samples: int


def tally(trajectories: Iterable[Trajectory]) -> dict[str, Tally]:
    """Samples and right ones of each prompt, over all training rollouts."""
    samples, solved = Counter[str](), Counter[str]()
    for trajectory in trajectories:
        if trajectory.kind == "train":
            samples[trajectory.prompt_id] += 1
            solved[trajectory.prompt_id] += trajectory.reward == 1.0
    return {name: Tally(solved[name], samples[name]) for name in samples}


def hard_problems(train: str | Path, tallies: dict[str, Tally], *, below: int, of: int) -> list[tuple[Problem, Tally]]:
    """Rows of the training file, in file order, with at least `of` samples and solved in less than below / of of them.

    DataError where the file does not hold the prompts of the journal, or none of them is hard.
    """
    problems = {prompt_id(problem.text): problem for problem in read_problems(train)}
    if tallies and not problems.keys() & tallies.keys():
        raise DataError(
            f"{train}: expected the problems this run trained on, found none of them; has data.train changed?"
        )
    hard = [
        (problem, tallies[name])
        for name, problem in problems.items()
        if name in tallies and tallies[name].samples >= of and tallies[name].solved * of < below * tallies[name].samples
    ]
    if not hard:
        most = max((t.samples for t in tallies.values()), default=0)
        raise DataError(
            f"{train}: expected prompts solved in fewer than {below} of {of} samples, found none among {len(tallies)} "
            f"(at most {most} samples each); choose a smaller --of or a larger --below"
        )
    return hard


def write(path: Path, hard: list[tuple[Problem, Tally]]) -> None:
    """JSONL that data.train reads; solved and samples are for the reader."""
    rows = (
        {"prompt": problem.text, "answer": problem.answer, "solved": t.solved, "samples": t.samples}
        for problem, t in hard
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise DiskError(f"{path}: expected to write the problems, found: {error.strerror}; free space") from error
