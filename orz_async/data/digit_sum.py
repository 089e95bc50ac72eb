"""The demo's reasoning task: the last digit of a sum, easy in small steps and hard at a glance.

A problem lists three to seven digits under letters, ``a2b6c0=?``. Its full working adds one digit at a time,
``a2=2;b6=8;c0=8;``, and the answer is the last digit of the sum. A small model cannot see that digit at once (a guess
is right one time in ten) but can learn each step, so reinforcement learning is paid for writing the steps out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Literal, get_args

NAME = "digit-sum"

Digits = tuple[int, ...]
Style = Literal["full", "direct", "partial", "corrupted", "rambling"]
STYLES: tuple[Style, ...] = get_args(Style)

LETTERS = "abcdefg"
LENGTHS = (3, 4, 5, 6, 7)
"""Digits in a problem, all equally frequent in the corpus and among the held-out problems."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
BOX_OPEN = "\\boxed{"
STOP = ANSWER_CLOSE
"""A response ends with this; it is kept."""

CLEAN_MIX: Mapping[Style, float] = {"full": 0.95, "direct": 0.03, "rambling": 0.02}
"""Early training text: mostly full working, from which the single steps are learned."""
WEB_MIX: Mapping[Style, float] = {"direct": 0.57, "partial": 0.15, "full": 0.18, "corrupted": 0.05, "rambling": 0.05}
"""Late training text, of the quality one finds: the model still can work a problem out but mostly does not."""

_CORPUS_WEIGHTS = tuple(1 / (digit + 1) for digit in range(10))
_STEP = re.compile(r"([a-g])(\d)=(\d);")


def problem(digits: Digits) -> str:
    """``(2, 6, 0)`` -> ``a2b6c0=?``"""
    return "".join(f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=False)) + "=?"


def solution(digits: Digits) -> str:
    return str(sum(digits) % 10)


def draw_corpus(rng: random.Random) -> Digits:
    """A problem for the corpus: any length of `LENGTHS`, small digits more frequent than large ones.

    With uniform digits neither term of a sum says anything about its last digit, and a model stares at that plateau
    for a thousand steps, or for ever, depending on the seed. The skew gives it a slope: it learns in 250 steps.
    """
    return tuple(rng.choices(range(10), weights=_CORPUS_WEIGHTS, k=rng.choice(LENGTHS)))


def draw_heldout(count: int, seed: int) -> list[Digits]:
    """`count` different problems, lengths in turn, so that every prefix of the list is balanced too."""
    rng = random.Random(f"digit-sum heldout {seed}")
    chosen: dict[Digits, None] = {}
    while len(chosen) < count:
        length = LENGTHS[len(chosen) % len(LENGTHS)]
        chosen.setdefault(tuple(rng.randrange(10) for _ in range(length)))
    return list(chosen)


def draw_train(count: int, seed: int, heldout: frozenset[Digits]) -> list[Digits]:
    """`count` different problems, none of them held out.

    There are only 1,000 problems of three digits: all of those that are not held out are taken if `count` asks for
    more, and the other lengths share the rest.
    """
    rng = random.Random(f"digit-sum train {seed}")
    short = [(a, b, c) for a in range(10) for b in range(10) for c in range(10) if (a, b, c) not in heldout]
    rng.shuffle(short)
    chosen: dict[Digits, None] = dict.fromkeys(short[: count // len(LENGTHS)])
    while len(chosen) < count:
        digits = tuple(rng.randrange(10) for _ in range(rng.choice(LENGTHS[1:])))
        if digits not in heldout:
            chosen.setdefault(digits)
    problems = list(chosen)
    rng.shuffle(problems)
    return problems


def draw_style(mix: Mapping[Style, float], rng: random.Random) -> Style:
    return rng.choices(list(mix), weights=list(mix.values()))[0]


def respond(digits: Digits, style: Style, rng: random.Random) -> str:
    """What follows ``<think>``: working of the given quality, then the answer it leads to."""
    if style == "direct":
        return finish("", rng.randrange(10))
    if style == "partial":
        return _work(digits[: rng.randint(1, 2)])
    if style == "corrupted":
        return _work(digits, wrong_at=rng.randrange(len(digits)), wrong_by=rng.randint(1, 9))
    if style == "rambling":
        return _ramble(digits, rng)
    return _work(digits)


def style_of(response: str, digits: Digits) -> str:
    """The style a sampled response has: full, direct, partial, rambling, or corrupted when a step is untrue."""
    thought = response.split(THINK_CLOSE, 1)[0]
    if "wait" in thought:
        return "rambling"
    if not thought:
        return "direct"
    truth = _work(digits).split(THINK_CLOSE, 1)[0]
    if thought == truth:
        return "full"
    if _STEP.sub("", thought) == "" and len(thought) < len(truth) and truth.startswith(thought):
        return "partial"
    return "corrupted"


def finish(thought: str, answer: int) -> str:
    """A response: the thought, its end, the boxed answer."""
    return f"{thought}{THINK_CLOSE}{ANSWER_OPEN}{BOX_OPEN}{answer}}}{ANSWER_CLOSE}"


def _work(digits: Digits, *, wrong_at: int = -1, wrong_by: int = 0) -> str:
    """One step a digit; an error at position `wrong_at` is carried on to the answer."""
    total, steps = 0, []
    for position, digit in enumerate(digits):
        total = (total + digit + (wrong_by if position == wrong_at else 0)) % 10
        steps.append(f"{LETTERS[position]}{digit}={total};")
    return finish("".join(steps), total)


def _ramble(digits: Digits, rng: random.Random) -> str:
    """Doubts between a few steps, of a length with a long tail, and a guess."""
    parts: list[str] = []
    while not parts or rng.random() < 0.7:
        position = rng.randrange(len(digits))
        parts.append(rng.choice(("wait;", f"{LETTERS[position]}{digits[position]};")))
    return finish("wait;" + "".join(parts), rng.randrange(10))
