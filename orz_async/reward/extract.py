"""Finds the final answer in a response, in time linear in its length, and limits what may be looked at."""

from __future__ import annotations

import re

ANSWER_OPEN, ANSWER_CLOSE, BOX = "<answer>", "</answer>", "\\boxed"

MAX_BYTES = 4096
MAX_DEPTH = 32
MAX_DIGITS = 200

_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_HUGE_POWER = re.compile(r"(?:\^|\*\*)[\s{(+-]*[0-9]{5}")
_HUGE_FACTORIAL = re.compile(r"[0-9]{5}[\s})]*!|![\s})]*!")
_NUMERIC_POWER = re.compile(r"[0-9\s^{}()+.-]*")
_OPENING, _CLOSING = "([{", ")]}"


def last_answer(response: str) -> str | None:
    """What the last complete <answer>...</answer> holds."""
    start = response.rfind(ANSWER_OPEN, 0, max(response.rfind(ANSWER_CLOSE), 0))
    if start < 0:
        return None
    start += len(ANSWER_OPEN)
    return response[start : response.index(ANSWER_CLOSE, start)]


def last_box(answer: str) -> str | None:
    r"""What the last \boxed{...} holds, its braces balanced; None if there is none or it is not closed."""
    start = answer.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    while start < len(answer) and answer[start].isspace():
        start += 1
    if answer[start : start + 1] != "{":
        return None
    end = closing_brace(answer, start)
    return None if end is None else answer[start + 1 : end].strip()


def closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace opened at `start` is closed. A backslash escapes what follows: \{ and \} do not count."""
    depth, position = 0, start
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def is_oversize(text: str) -> bool:
    """True for what no sane answer needs and a computer algebra system would choke on."""
    # The character count is first: it bounds the work of the rest.
    return (
        len(text) > MAX_BYTES
        or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES
        or _LONG_NUMBER.search(text) is not None
        or _depth(text) > MAX_DEPTH
        or _HUGE_POWER.search(text) is not None
        or _HUGE_FACTORIAL.search(text) is not None
        or _has_tower(text.replace("**", "^"))
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif character in _CLOSING:
            depth -= 1
    return deepest


def _has_tower(text: str) -> bool:
    """A power in the exponent of a power of numbers, such as 9^{9^9}; e^{-x^2} is none."""
    for match in re.finditer(r"\^", text):
        start = match.end()
        end = closing_brace(text, start) if text[start : start + 1] == "{" else start
        if end is None:
            return True
        exponent, rest = text[start : end + 1], text[end + 1 : end + 2]
        if rest == "^" or exponent.count("^") > 1:
            return True
        if "^" in exponent and _NUMERIC_POWER.fullmatch(exponent):
            return True
    return False
