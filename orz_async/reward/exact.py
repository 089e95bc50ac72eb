r"""Compares answers exactly: numbers as fractions, tuples by element, sets in any order, words as words.

`same_answer` says True or False only where the written forms leave no doubt, and None for everything else (roots,
variables, intervals of expressions, ...), which goes to a verifier. Only regular expressions without nested
repetition and `fractions.Fraction` see the text; nothing is evaluated. Conventions, chosen where usage differs:

- A unit may be left out, but two different units are different answers. Degrees are a unit.
- 50% equals 50 (the percent sign left out) and 0.5 (its value); with two percent signs the numbers are compared.
- 1,234 is one number; (1,234) and 1, 234 are two. A tuple never equals a number: (1,2) is not 12.
- Brackets matter: (1,2) is not [1,2]. A list without brackets is a set: its order is free.
- ``x=5`` equals 5: a single letter's assignment names what was asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from orz_async.reward.latex import tidy, unit_of

# [0-9] rather than \d, which also matches the digits of other scripts.
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
_FRACTION = (
    rf"\\frac(?:\{{(?P<over>[+-]?{_NUMBER})\}}|(?P<over_digit>[0-9]))"
    rf"(?:\{{(?P<under>[+-]?{_NUMBER})\}}|(?P<under_digit>[0-9]))"
)
_SCALAR = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)?{_FRACTION}"
    rf"|(?P<left>{_NUMBER})/(?P<right>{_NUMBER})"
    rf"|(?P<mantissa>{_NUMBER})(?:\\times|\\cdot)10\^(?:\{{(?P<exponent>[+-]?[0-9]{{1,3}})\}}|(?P<exponent_digit>[0-9]))"
    rf"|(?P<plain>{_NUMBER}))(?P<percent>%?)"
)
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?![,0-9])")
_ASSIGNMENT = re.compile(r"([A-Za-z])=(?=[^=])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\{\(?([A-Za-z][A-Za-z ,.'-]*)\)?\}")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Za-z]+)")
_NO_NUMBER = re.compile(r"(?![0-9.]+[ghlms]$)[0-9A-Za-z;:?<>_'\"&@#|]*")
"""Letters, digits and marks without an operator, blank or command: no number, whatever they mean (5m may be metres)."""
_SET_OPEN, _SET_CLOSE = "\x01", "\x02"
_OPENING, _CLOSING = "([{" + _SET_OPEN, ")]}" + _SET_CLOSE
_NEARLY = Fraction(1, 10**5)
"""Closer than this, an inexact decimal may stand for the other number: a verifier decides."""


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    is_percent: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    is_surely_text: bool
    """False for bare letters, which may also be a product of variables."""


@dataclass(frozen=True, slots=True)
class Group:
    brackets: str
    """As written, such as "()" or "[)"; "{}" for a set and "" for a list without brackets."""
    items: tuple[Form, ...]


Form = Number | Word | Group


def same_answer(reference: str, candidate: str) -> bool | None:
    """Whether two answers are equal, or None if that takes more than exact rules."""
    left, right = tidy(reference), tidy(candidate)
    if left == right:
        return bool(left)
    left_name, left = _split_assignment(left)
    right_name, right = _split_assignment(right)
    if left_name and right_name and left_name != right_name:
        return None
    left_form, right_form = parse(left), parse(right)
    if isinstance(left_form, Number) and not isinstance(right_form, Number) and _NO_NUMBER.fullmatch(right):
        return False
    if left_form is None or right_form is None:
        return None
    return _same(left_form, right_form)


def parse(text: str) -> Form | None:
    """The form of a tidied text, or None if it is none of those this module understands."""
    if (group := _group(text)) is not None:
        return group
    if match := _SCALAR.match(text):
        return _number(match, text[match.end() :])
    if match := _TEXT.fullmatch(text):
        return Word(" ".join(match[1].casefold().split()), True)
    if match := _CHOICE.fullmatch(text):
        return Word((match[1] or match[2]).casefold(), False)
    return None


def _split_assignment(text: str) -> tuple[str, str]:
    match = _ASSIGNMENT.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _number(match: re.Match[str], rest: str) -> Number | None:
    unit = unit_of(rest)
    if unit is None:
        return None
    part = match.groupdict()
    if part["plain"] is not None:
        value = _exact(part["plain"])
    elif part["mantissa"] is not None:
        value = _exact(part["mantissa"]) * Fraction(10) ** int(part["exponent"] or part["exponent_digit"])
    else:
        over = _exact(part["left"] or part["over"] or part["over_digit"])
        under = _exact(part["right"] or part["under"] or part["under_digit"])
        # A mixed number has no sign inside; 1/0 is no number.
        if under == 0 or (part["whole"] and (over < 0 or under < 0)):
            return None
        value = over / under + int(part["whole"] or 0)
    return Number(-value if part["sign"] == "-" else value, part["percent"] == "%", unit)


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _group(text: str) -> Group | None:
    """A bracketed tuple, interval or set, or a list without brackets; None for anything that is not a sequence."""
    # One character for each brace of a set, so that it is told from a brace that only groups.
    text = text.replace("\\{", _SET_OPEN).replace("\\}", _SET_CLOSE)
    brackets, inner = "", text
    if text[:1] in ("(", "[", _SET_OPEN) and _closes_at_end(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    elif _THOUSANDS.match(text):
        return None
    parts = _split_commas(inner)
    if len(parts) < 2 and brackets != _SET_OPEN + _SET_CLOSE:
        return None
    items = [parse(part.replace(_SET_OPEN, "\\{").replace(_SET_CLOSE, "\\}").strip()) for part in parts]
    known = tuple(item for item in items if item is not None)
    if len(known) < len(items):
        return None
    return Group("{}" if brackets == _SET_OPEN + _SET_CLOSE else brackets, known)


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0:
            return position == len(text) - 1
    return False


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _same(left: Form, right: Form) -> bool | None:
    if isinstance(left, Number) and isinstance(right, Number):
        return _same_number(left, right)
    if isinstance(left, Group) and isinstance(right, Group):
        return _same_group(left, right)
    if isinstance(left, Word) and isinstance(right, Word):
        if left.text == right.text:
            return True
        surely = left.is_surely_text or right.is_surely_text or len(left.text) == len(right.text) == 1
        return False if surely else None
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Number) and isinstance(other, Group) and len(other.items) > 1:
            return False
        if isinstance(one, Number) and isinstance(other, Word) and other.is_surely_text:
            return False
    return None


def _same_number(left: Number, right: Number) -> bool | None:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.is_percent == right.is_percent:
        distance = abs(left.value - right.value)
    else:
        percent, plain = (left, right) if left.is_percent else (right, left)
        distance = min(abs(percent.value - plain.value), abs(percent.value / 100 - plain.value))
    if distance == 0:
        return True
    return None if distance < _NEARLY else False


def _same_group(left: Group, right: Group) -> bool | None:
    free = ("{}", "")
    if left.brackets in free and right.brackets in free:
        return _same_set(left.items, right.items)
    if left.brackets in free or right.brackets in free:
        return None
    if left.brackets != right.brackets or len(left.items) != len(right.items):
        return False
    verdicts = [_same(one, other) for one, other in zip(left.items, right.items, strict=True)]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _same_set(left: tuple[Form, ...], right: tuple[Form, ...]) -> bool | None:
    """Equal if every element of each is in the other."""
    verdicts = [_in(item, right) for item in left] + [_in(item, left) for item in right]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _in(item: Form, items: tuple[Form, ...]) -> bool | None:
    verdicts = [_same(item, other) for other in items]
    if True in verdicts:
        return True
    return None if None in verdicts else False
