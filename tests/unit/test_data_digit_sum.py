"""The demo's task: problems, workings of every quality, splits that do not overlap, and its tokenizer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from orz_async.data import digit_sum
from orz_async.data.char_tokenizer import CHARACTERS, TAGS, vocabulary, write_tokenizer
from orz_async.data.digit_sum import Digits, Style
from orz_async.data.tokenizer import load_tokenizer
from orz_async.reward.grade import Verdict, grade


def is_right(response: str, digits: Digits) -> bool:
    verdict = grade(response, digit_sum.solution(digits), "stop")
    assert isinstance(verdict, Verdict) and verdict.verdict in ("correct", "wrong")
    return verdict.reward == 1.0


def test_a_problem_and_its_full_working() -> None:
    digits = (2, 6, 0, 1, 8)
    assert digit_sum.problem(digits) == "a2b6c0d1e8=?"
    assert digit_sum.solution(digits) == "7"
    full = digit_sum.respond(digits, "full", random.Random(0))
    assert full == "a2=2;b6=8;c0=8;d1=9;e8=7;</think><answer>\\boxed{7}</answer>"


@pytest.mark.parametrize("style", get_args(Style))
def test_workings_of_each_quality_are_recognised_and_only_full_ones_are_reliable(style: Style) -> None:
    rng = random.Random(1)
    problems = [digit_sum.draw_corpus(rng) for _ in range(500)]
    responses = [digit_sum.respond(digits, style, rng) for digits in problems]
    assert {digit_sum.style_of(response, digits) for response, digits in zip(responses, problems, strict=True)} == {
        style
    }
    accuracy = sum(map(is_right, responses, problems)) / len(problems)
    low, high = {
        "full": (1, 1),
        "direct": (0.05, 0.16),
        "partial": (0.03, 0.2),
        "corrupted": (0, 0),
        "rambling": (0.05, 0.16),
    }[style]
    assert low <= accuracy <= high


@pytest.mark.parametrize(
    ("response", "style"),
    [
        ("a2=2;b6=9;c0=8;</think>", "corrupted"),  # a wrong step, even if the end is right
        ("a2=2;c0=2;</think>", "corrupted"),  # a digit left out
        ("a2=2;b6=8;c0=8;c0=8;</think>", "corrupted"),
        ("a2=2;b6=8;</think>", "partial"),
        ("a2=2;b6=8;c0=8;", "full"),
        ("wait;</think>", "rambling"),
        ("hello</think>", "corrupted"),
    ],
)
def test_a_sampled_response_is_named_by_its_working(response: str, style: str) -> None:
    assert digit_sum.style_of(response, (2, 6, 0)) == style


def test_splits_are_seeded_balanced_and_disjoint() -> None:
    heldout = digit_sum.draw_heldout(600, seed=4)
    assert heldout == digit_sum.draw_heldout(600, seed=4) != digit_sum.draw_heldout(600, seed=5)
    assert len(set(heldout)) == 600
    assert set(Counter(map(len, heldout[:200])).values()) == {40}
    train = digit_sum.draw_train(20_000, 4, frozenset(heldout))
    assert train == digit_sum.draw_train(20_000, 4, frozenset(heldout))
    assert len(set(train)) == 20_000
    assert not set(train) & set(heldout)
    # All the three-digit problems there are: 1,000 less those held out.
    assert Counter(map(len, train))[3] == 1000 - 120


def test_styles_are_drawn_in_the_shares_of_their_mix() -> None:
    rng = random.Random(0)
    for mix in (digit_sum.CLEAN_MIX, digit_sum.WEB_MIX):
        assert sum(mix.values()) == pytest.approx(1)
        count = Counter(digit_sum.draw_style(mix, rng) for _ in range(4000))
        for style, share in mix.items():
            assert count[style] / 4000 == pytest.approx(share, abs=0.04)


def test_the_tokenizer_has_one_token_a_character_and_a_tag_and_gives_text_back(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == len(vocabulary()) == len(TAGS) + len(CHARACTERS) + 2
    text = "a2=2;</think> <answer>\\boxed{8}</answer>"
    tokens = tokenizer.encode(text)
    assert [tokenizer.decode([token]) for token in tokens] == [
        *"a2=2;", "</think>", " ", "<answer>", "\\boxed{", "8", "}", "</answer>",
    ]  # fmt: skip
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(CHARACTERS + "".join(TAGS))) == CHARACTERS + "".join(TAGS)
    assert tokenizer.eos_token_id == 0
