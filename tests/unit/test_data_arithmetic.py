"""The harder mix: answers found again from the text alone, workings that the reward grades, shares, splits."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import get_args

import pytest

from orz_async.data import arithmetic
from orz_async.data.arithmetic import KINDS, SHARES, Kind, Problem
from orz_async.data.char_tokenizer import vocabulary
from orz_async.data.digit_sum import Style
from orz_async.data.source import content_key
from orz_async.learner.base_plan import SMALL
from orz_async.reward.grade import Verdict, grade


def answer_of(text: str) -> int:
    """From the text of a problem alone, by other means than the task's: products by addition, x by trying."""

    def product(a: int, b: int) -> int:
        return sum(a for _ in range(b))

    if found := re.fullmatch(r"max\((\d+)\*(\d+),(\d+)\+(\d+)\)=\?", text):
        a, b, c, d = map(int, found.groups())
        return sorted((product(a, b), c + d))[-1]
    if found := re.fullmatch(r"\((\d+)\*(\d+)\+(\d+)\)%(\d+)=\?", text):
        a, b, c, m = map(int, found.groups())
        left = product(a, b) + c
        while left >= m:
            left -= m
        return left
    if found := re.fullmatch(r"(\d+)x([+-]\d+)=(-?\d+),x=\?", text):
        a, b, c = map(int, found.groups())
        [x] = [x for x in range(-1000, 1001) if a * x + b == c]
        return x
    found = re.fullmatch(r"(\d+)((?:[+-]\d+)+)=\?", text)
    assert found is not None, text
    return int(found[1]) + sum(map(int, re.findall(r"[+-]\d+", found[2])))


def is_right(response: str, made: Problem) -> bool:
    verdict = grade(response, arithmetic.solution(made), "stop")
    assert isinstance(verdict, Verdict) and verdict.verdict in ("correct", "wrong"), "the exact rules settle it"
    return verdict.reward == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right_and_every_step_of_its_working_true(kind: Kind) -> None:
    rng = random.Random(kind)
    for _ in range(2000):
        made = arithmetic.draw(kind, rng)
        text = arithmetic.problem(made)
        assert int(arithmetic.solution(made)) == answer_of(text), text
        response = arithmetic.respond(made, "full", rng)
        assert is_right(response, made)
        for left, sign, right, value in re.findall(r"(-?\d+)([-+*/])(-?\d+)=(-?\d+);", response):
            a, b, c = int(left), int(right), int(value)
            true = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": 0 <= a - b * c < b}[sign]
            assert true, (text, response)


def test_a_problem_of_each_kind_and_its_working() -> None:
    want = {
        Problem("sum", (347, 58, -420)): ("347+58-420=?", "347+58=405;405-420=-15;", "-15"),
        Problem("larger", (23, 7, 90, 80)): ("max(23*7,90+80)=?", "23*7=161;90+80=170;", "170"),
        Problem("remainder", (87, 9, 456, 13)): (
            "(87*9+456)%13=?",
            "87*9=783;783+456=1239;1239/13=95;95*13=1235;1239-1235=4;",
            "4",
        ),
        Problem("equation", (7, -15, -4)): ("7x-15=-43,x=?", "-43+15=-28;-28/7=-4;", "-4"),
    }
    for made, (text, steps, answer) in want.items():
        assert arithmetic.problem(made) == text
        full = arithmetic.respond(made, "full", random.Random(0))
        assert full == f"{steps}</think><answer>\\boxed{{{answer}}}</answer>"


@pytest.mark.parametrize("style", get_args(Style))
def test_workings_of_each_quality_are_recognised_and_only_full_ones_are_reliable(style: Style) -> None:
    rng = random.Random(1)
    problems = [arithmetic.draw_corpus(rng) for _ in range(1000)]
    responses = [arithmetic.respond(made, style, rng) for made in problems]
    pairs = list(zip(responses, problems, strict=True))
    assert {arithmetic.style_of(response, made) for response, made in pairs} == {style}
    accuracy = sum(is_right(response, made) for response, made in pairs) / len(problems)
    low, high = (1.0, 1.0) if style == "full" else (0.0, 0.35) if style == "corrupted" else (0.06, 0.17)
    assert low <= accuracy <= high


def test_splits_are_seeded_in_their_shares_and_disjoint() -> None:
    heldout = arithmetic.draw_heldout(1000, 3)
    assert heldout == arithmetic.draw_heldout(1000, 3) != arithmetic.draw_heldout(1000, 4)
    train = arithmetic.draw_train(20_000, 3, frozenset(heldout))
    assert (
        train == arithmetic.draw_train(20_000, 3, frozenset(heldout)) != arithmetic.draw_train(20_000, 4, frozenset())
    )
    assert sum(SHARES.values()) == 20
    for problems, count in ((heldout, 1000), (heldout[:200], 200), (train, 20_000)):
        assert Counter(made.kind for made in problems) == {kind: n * count // 20 for kind, n in SHARES.items()}
    keys = [{content_key(arithmetic.problem(made)) for made in problems} for problems in (heldout, train)]
    assert (len(keys[0]), len(keys[1])) == (1000, 20_000), "different problems have different texts"
    assert not keys[0] & keys[1]
    # Many draws of the small kinds collide: what is held out must be passed over, not merely unlikely.
    few = frozenset(made for made in arithmetic.draw_train(20_000, 3, frozenset()) if made.kind == "equation")
    assert not few & set(arithmetic.draw_train(20_000, 3, few))


def test_corpus_shares_and_what_fits_into_the_recipe() -> None:
    rng = random.Random(0)
    problems = [arithmetic.draw_corpus(rng) for _ in range(8000)]
    count = Counter(made.kind for made in problems)
    for kind, n in SHARES.items():
        assert count[kind] / 8000 == pytest.approx(n / 20, abs=0.02)
    characters = set(vocabulary())
    for made in problems:
        text, response = arithmetic.problem(made), arithmetic.respond(made, "full", rng)
        assert set(text) <= characters and len(text) <= 40
        assert len(response) <= SMALL.max_new_tokens
