"""The reward rule on tricky answers: what counts, what does not, and what is left to a verifier."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orz_async.reward.exact import same_answer
from orz_async.reward.extract import is_oversize, last_answer, last_box
from orz_async.reward.grade import Undecided, Verdict, grade


def respond(box: str) -> str:
    return f"so it is</think> <answer>\\boxed{{{box}}}</answer>"


def word(response: str, answer: str = "8", finish: str = "stop") -> str:
    outcome = grade(response, answer, finish)  # type: ignore[arg-type]
    assert isinstance(outcome, Verdict)
    assert outcome.reward == (1.0 if outcome.verdict == "correct" else 0.0)
    return outcome.verdict


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (respond("8"), "correct"),
        ("<answer>\\boxed{8}</answer>", "correct"),
        (respond("7"), "wrong"),
        ("", "no_answer"),
        ("it is \\boxed{8}", "no_answer"),
        ("</think><answer>\\boxed{8}", "no_answer"),
        ("</answer>\\boxed{8}<answer>", "no_answer"),
        ("<answer>8</answer>", "no_box"),
        ("<answer>\\boxed 8</answer>", "no_box"),
        ("<answer>\\boxed{8</answer>", "no_box"),
        ("<answer>\\boxed{8</answer>}", "no_box"),
        ("\\boxed{8}<answer>8</answer>", "no_box"),
        ("<answer>\\boxed {8}</answer>", "correct"),
        ("<answer>\\boxed{}</answer>", "wrong"),
        # Only the last answer counts, and in it only the last box.
        (respond("8") + respond("7"), "wrong"),
        (respond("7") + respond("8"), "correct"),
        (respond("7") + "<answer>\\boxed{8}", "wrong"),
        ("<answer>\\boxed{7} no, \\boxed{8}</answer>", "correct"),
        ("<answer>\\boxed{8} no, \\boxed{7}</answer>", "wrong"),
        ("<answer>\\boxed{8} no, \\boxed{8</answer>", "no_box"),
        ("<answer>\\boxed{8}</answer> and more </answer>", "correct"),
        ("<answer><answer>\\boxed{8}</answer>", "correct"),
        ("<answer>\\boxed{\\boxed{8}}</answer>", "correct"),
        ("<answer>\nThe result is $\\boxed{8}$.\n</answer>", "correct"),
    ],
)
def test_only_the_last_box_of_the_last_answer_counts(response: str, verdict: str) -> None:
    assert word(response) == verdict


def test_a_truncated_response_earns_nothing_even_if_its_answer_is_right() -> None:
    assert word(respond("8"), finish="length") == "truncated"


def test_braces_in_the_box_are_balanced_and_escaped_ones_do_not_count() -> None:
    assert last_box("\\boxed{\\frac{1}{\\sqrt{2}}} {}") == "\\frac{1}{\\sqrt{2}}"
    assert last_box("\\boxed{\\{1,2\\}}") == "\\{1,2\\}"
    assert last_box("\\boxed{\\}}") == "\\}"
    assert last_box("\\boxed{a\\\\{b}}") == "a\\\\{b}"
    assert last_answer("<answer>a</answer>x<answer>b</answer></answer>") == "b"


EQUAL = [
    ("8", "08"),
    ("8", "8.0"),
    ("8", "+8"),
    ("8", "8."),
    ("-5", "\u22125"),
    ("12", "{12}"),
    ("12", "$12$"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    ("10000", "10,\\!000"),
    ("1,234,567.5", "1234567.5"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", ".5"),
    ("\\frac12", "1/2"),
    ("\\dfrac{1}{2}", "\\frac 1 2"),
    ("\\frac{1}{2}", "\\tfrac{2}{4}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("3\\frac{1}{2}", "7/2"),
    ("-3\\frac{1}{2}", "-3.5"),
    ("1500", "1.5 \\times 10^{3}"),
    ("0.1", "0.10000000000000000000000000000"),
    ("50\\%", "50"),
    ("50\\%", "0.5"),
    ("0.5", "50\\%"),
    ("50\\%", "50 percent"),
    ("5\\text{ cm}", "5"),
    ("5", "5\\text{ cm}"),
    ("5\\text{ cm}", "5 centimeters"),
    ("5 \\text{ cm}^2", "5\\text{ square centimeters}"),
    ("5 dollars", "\\$5"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90 degrees"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("(1,2)", "( 1 , 2 )"),
    ("(1,2)", "\\left(1, 2\\right)"),
    ("(\\frac{1}{2},3)", "(0.5,3.0)"),
    ("[1,2)", "[1, 2)"),
    ("1,2", "2,1"),
    ("1,2", "1\\text{ and }2"),
    ("\\{1,2\\}", "\\left\\{2, 1\\right\\}"),
    ("\\{1,2\\}", "1,2"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("(-\\infty,2)", "(-\\infty, 2)"),
    ("\\text{Monday}", "monday"),
    ("B", "(B)"),
    ("\\text{(B)}", "B"),
    ("2\\sqrt{3}", "2 \\sqrt{3}"),
]

DIFFERENT = [
    ("8", "9"),
    ("8", "-8"),
    ("12", "(1,2)"),
    ("(1,2)", "12"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("[1,2)", "(1,2)"),
    ("(1,234)", "1234"),
    ("12", "1, 2"),
    ("1,2,3", "1,2"),
    ("1,2", "1,2,3"),
    ("1,234", "1,235"),
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("0.333", "1/3"),
    ("0.5\\%", "50\\%"),
    ("50", "0.5"),
    ("5\\text{ cm}", "5\\text{ m}"),
    ("5\\text{ cm}", "5\\text{ cm}^2"),
    ("\\text{Monday}", "\\text{Tuesday}"),
    ("\\text{even}", "3"),
    ("B", "C"),
    ("8", "b"),
    ("8", "8;"),
    ("8", "8a"),
    ("8", ""),
]

UNDECIDED = [
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("ab", "ba"),
    ("5x", "5"),
    ("1 2", "12"),
    ("5", "5\\text{ million}"),
    ("0.333333", "1/3"),
    ("1", "\\frac{1}{0}"),
    ("2\\frac{-1}{2}", "1.5"),
    ("x=5", "y=5"),
    ("3", "\u0663"),
]


@pytest.mark.parametrize(("reference", "candidate"), EQUAL)
def test_equal_answers(reference: str, candidate: str) -> None:
    assert word(respond(candidate), reference) == "correct"


@pytest.mark.parametrize(("reference", "candidate"), DIFFERENT)
def test_different_answers(reference: str, candidate: str) -> None:
    assert word(respond(candidate), reference) == "wrong"


@pytest.mark.parametrize(("reference", "candidate"), UNDECIDED)
def test_what_needs_algebra_is_left_to_a_verifier(reference: str, candidate: str) -> None:
    assert grade(respond(candidate), reference, "stop") == Undecided(reference, candidate)


@pytest.mark.parametrize(
    "candidate",
    [
        "9^{9^{9^9}}",
        "9**9**9",
        "2^{3^4}",
        "10^{99999999}",
        "x^99999",
        "99999!",
        "5!!!",
        "1" * 201,
        "(" * 33 + "5" + ")" * 33,
        "5" + "+5" * 2048,
        "\u00e9" * 2049,
    ],
)
def test_hostile_answers_are_refused_unseen(candidate: str) -> None:
    assert word(respond(candidate), "5") == "oversize"
    # Repeating the reference literally is right however large it is.
    assert word(respond(candidate), candidate) == "correct"


@pytest.mark.parametrize("candidate", ["e^{-x^2}", "2^{10}", "1" * 200, "(" * 32 + "5" + ")" * 32, "x^{2}+y^{2}", "5!"])
def test_sane_answers_are_not_refused(candidate: str) -> None:
    assert not is_oversize(candidate)


@pytest.mark.parametrize(
    "response",
    [
        "<answer>" * 20_000,
        "<answer>\\boxed{" * 10_000 + "</answer>",
        "\\boxed{" * 20_000,
        "</answer>" * 20_000,
        "{" * 200_000,
    ],
)
def test_the_work_is_linear_in_the_response(response: str) -> None:
    start = time.process_time()
    word(response)
    word(respond(response))
    # Quadratic scanning of these would take minutes.
    assert time.process_time() - start < 1.0


NUMBERS = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.builds("\\frac{{{}}}{{{}}}".format, st.integers(-50, 50), st.integers(1, 50)),
)
ANSWERS = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, min_size=2, max_size=4).map(lambda items: "(" + ",".join(items) + ")"),
    st.lists(NUMBERS, min_size=1, max_size=4).map(lambda items: "\\{" + ", ".join(items) + "\\}"),
)


@given(ANSWERS, ANSWERS)
def test_comparison_is_reflexive_and_symmetric(left: str, right: str) -> None:
    assert same_answer(left, left + " ") is True
    assert same_answer(left, right) == same_answer(right, left)


@given(st.text(max_size=200), st.text(alphabet="0123456789.,()[]{}\\^!/%+-=x frac text", max_size=60))
def test_no_text_makes_grading_fail(response: str, candidate: str) -> None:
    grade(response, "5", "stop")
    grade(respond(candidate), "(1,2)", "stop")
    grade(respond(candidate), candidate[::-1], "stop")
