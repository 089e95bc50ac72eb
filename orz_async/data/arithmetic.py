"""A harder mix of tasks: sums, comparisons, remainders and linear equations of several digits, worked out in steps.

Each problem is a few operations on small numbers, none of which a small model sees the result of at a glance; written
out one by one (``7*48=336;336+905=1241;``) each of them can be learned. So reinforcement learning is paid for writing
the working, as with the digit sum, but the steps are longer, and which steps they are depends on the problem.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from orz_async.data.digit_sum import THINK_CLOSE, Style, finish

NAME = "arithmetic"

Kind = Literal["sum", "larger", "remainder", "equation"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHARES: Mapping[Kind, int] = {"sum": 6, "larger": 4, "remainder": 5, "equation": 5}
"""Problems of each kind in every 20, in each split."""

CLEAN_MIX: Mapping[Style, float] = {"full": 0.95, "direct": 0.03, "rambling": 0.02}
WEB_MIX: Mapping[Style, float] = {"direct": 0.50, "partial": 0.15, "full": 0.25, "corrupted": 0.05, "rambling": 0.05}
"""As of the digit sum, with a little more full working: a guess is right far less often here."""

_TURN: tuple[Kind, ...] = ("sum", "remainder", "equation", "larger") * 4 + ("sum", "remainder", "equation", "sum")
"""Twenty problems in their shares, mixed, so that the start of a list is mixed too."""


class Problem(NamedTuple):
    """`numbers` are, by kind: the terms of a sum; (a, b, c, d) of max(a*b,c+d); (a, b, c, m) of (a*b+c)%m;
    (a, b, x) of ax+b=c, whose c follows."""

    kind: Kind
    numbers: tuple[int, ...]


class Working:
    """Steps written so far. Step number `wrong_at` is off by `wrong_by`, and what follows goes on from there."""

    def __init__(self, *, wrong_at: int = -1, wrong_by: int = 0) -> None:
        self.steps: list[str] = []
        self._wrong_at, self._wrong_by = wrong_at, wrong_by

    def step(self, text: str, value: int) -> int:
        if len(self.steps) == self._wrong_at:
            value += self._wrong_by
        self.steps.append(f"{text}={value};")
        return value


def problem(made: Problem) -> str:
    """``Problem("equation", (7, -15, 4))`` -> ``7x-15=13,x=?``"""
    numbers = made.numbers
    if made.kind == "sum":
        return f"{numbers[0]}{''.join(f'{term:+}' for term in numbers[1:])}=?"
    a, b, c, *rest = numbers
    if made.kind == "larger":
        return f"max({a}*{b},{c}+{rest[0]})=?"
    if made.kind == "remainder":
        return f"({a}*{b}+{c})%{rest[0]}=?"
    return f"{a}x{b:+}={a * c + b},x=?"


def solution(made: Problem) -> str:
    return str(_solve(made, Working()))


def _solve(made: Problem, work: Working) -> int:
    """The answer that this working leads to, step by step."""
    numbers = made.numbers
    if made.kind == "sum":
        total = numbers[0]
        for term in numbers[1:]:
            total = work.step(f"{total}{term:+}", total + term)
        return total
    a, b, c, *rest = numbers
    if made.kind == "larger":
        product = work.step(f"{a}*{b}", a * b)
        return max(product, work.step(f"{c}+{rest[0]}", c + rest[0]))
    if made.kind == "remainder":
        product = work.step(f"{a}*{b}", a * b)
        total = work.step(f"{product}+{c}", product + c)
        times = work.step(f"{total}/{rest[0]}", total // rest[0])
        whole = work.step(f"{times}*{rest[0]}", times * rest[0])
        return work.step(f"{total}-{whole}", total - whole)
    right = a * c + b
    left = work.step(f"{right}{-b:+}", right - b)
    return work.step(f"{left}/{a}", left // a)


def draw(kind: Kind, rng: random.Random) -> Problem:
    """A problem of this kind, uniform within its ranges."""
    if kind == "sum":
        terms = [rng.choice((-1, 1)) * rng.randint(10, 999) for _ in range(rng.randint(2, 4))]
        return Problem(kind, (rng.randint(10, 999), *terms))
    if kind == "larger":
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        # Close to the product, so that both must be worked out.
        total = max(20, a * b + rng.randint(-60, 60))
        c = rng.randint(10, total - 10)
        return Problem(kind, (a, b, c, total - c))
    if kind == "remainder":
        return Problem(kind, (rng.randint(11, 99), rng.randint(2, 9), rng.randint(10, 499), rng.randint(6, 19)))
    b = rng.choice((-1, 1)) * rng.randint(1, 199)
    return Problem(kind, (rng.randint(2, 12), b, rng.randint(-40, 40)))


def draw_corpus(rng: random.Random) -> Problem:
    return draw(rng.choice(_TURN), rng)


def draw_heldout(count: int, seed: int) -> list[Problem]:
    """`count` different problems, kinds in turn in their shares."""
    return _different(count, random.Random(f"arithmetic heldout {seed}"), frozenset())


def draw_train(count: int, seed: int, heldout: frozenset[Problem]) -> list[Problem]:
    """`count` different problems in the same shares, none of them held out."""
    rng = random.Random(f"arithmetic train {seed}")
    problems = _different(count, rng, heldout)
    rng.shuffle(problems)
    return problems


def _different(count: int, rng: random.Random, without: frozenset[Problem]) -> list[Problem]:
    chosen: dict[Problem, None] = {}
    while len(chosen) < count:
        made = draw(_TURN[len(chosen) % len(_TURN)], rng)
        if made not in without:
            chosen.setdefault(made)
    return list(chosen)


def respond(made: Problem, style: Style, rng: random.Random) -> str:
    """What follows ``<think>``: working of the given quality, then the answer it leads to."""
    work = Working()
    answer = _solve(made, work)
    if style == "direct":
        return finish("", _guess(answer, rng))
    if style == "partial":
        return finish("".join(work.steps[: rng.randint(1, len(work.steps) - 1)]), _guess(answer, rng))
    if style == "rambling":
        return finish(_ramble(work.steps, rng), _guess(answer, rng))
    if style == "corrupted":
        work = Working(wrong_at=rng.randrange(len(work.steps)), wrong_by=rng.choice((-10, -2, -1, 1, 2, 10)))
        answer = _solve(made, work)
    return finish("".join(work.steps), answer)


def style_of(response: str, made: Problem) -> str:
    """The style a sampled response has: full, direct, partial, rambling, or corrupted when a step is untrue."""
    thought = response.split(THINK_CLOSE, 1)[0]
    if "wait" in thought:
        return "rambling"
    if not thought:
        return "direct"
    work = Working()
    _solve(made, work)
    if thought == "".join(work.steps):
        return "full"
    return "partial" if thought in accumulate(work.steps) else "corrupted"


def _guess(answer: int, rng: random.Random) -> int:
    """Of about the right size, and right one time in nine."""
    return answer + rng.randint(-4, 4)


def _ramble(steps: list[str], rng: random.Random) -> str:
    """Doubts between a few steps, of a length with a long tail."""
    parts = ["wait;"]
    while len(parts) < 2 or rng.random() < 0.7:
        parts.append(rng.choice(("wait;", rng.choice(steps))))
    return "".join(parts)
