"""The rule of Open-Reasoner-Zero: reward 1 for a response that stopped and whose boxed answer equals the reference.

No part of the reward is for form. The prompt opens the thought, so a response may begin in the middle of one; only its
last <answer>...</answer> is looked at, and in it only the last \\boxed{}.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from orz_async.records import Finish
from orz_async.reward.exact import same_answer
from orz_async.reward.extract import is_oversize, last_answer, last_box

Word = Literal[
    "correct",
    "wrong",
    "no_answer",  # no complete <answer>...</answer>
    "no_box",  # no closed \boxed{...} in it
    "truncated",  # the response ran into the length limit
    "timeout",  # comparing took more than the verifier's CPU seconds
    "error",  # the verifier died of this answer, more than once
    "oversize",  # the answer is larger than a comparison is tried for
]


class Verdict(NamedTuple):
    reward: float
    verdict: Word


class Undecided(NamedTuple):
    """The exact rules cannot tell whether these are equal: a verifier process must."""

    reference: str
    candidate: str


def grade(response: str, answer: str, finish: Finish) -> Verdict | Undecided:
    """Judge one response against the reference `answer`; pure, and safe on any text."""
    if finish != "stop":
        return Verdict(0.0, "truncated")
    if (final := last_answer(response)) is None:
        return Verdict(0.0, "no_answer")
    if (candidate := last_box(final)) is None:
        return Verdict(0.0, "no_box")
    if candidate == answer.strip():
        return Verdict(1.0, "correct")
    if is_oversize(candidate) or is_oversize(answer):
        return Verdict(0.0, "oversize")
    equal = same_answer(answer, candidate)
    if equal is None:
        return Undecided(answer, candidate)
    return settled(equal)


def settled(equal: bool) -> Verdict:
    return Verdict(1.0, "correct") if equal else Verdict(0.0, "wrong")
