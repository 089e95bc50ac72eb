r"""Removes from an answer what is typesetting only, and recognises units. Text in, text out; nothing is evaluated."""

from __future__ import annotations

import re

from orz_async.reward.extract import closing_brace

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_THOUSANDS_MARK = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\!,|\\,)(?=[0-9]{3})")
_SPACING = re.compile(r"\\(?:[,;:! ]|quad|qquad|displaystyle)(?![A-Za-z])|~")
_SIZING = re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])")
_SPACE_TO_DROP = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_SPACE_AFTER_COMMAND = re.compile(r"(\\[A-Za-z]+)\s+(?![A-Za-z])")
_DEGREE = re.compile(r"\^\{?\\circ\}?|\\degree|°")
_PERCENT = re.compile(r"\\%|(?<=[0-9}])\s*(?:\\text\{\s*)?percent\b\}?")
_AND = re.compile(r"\s*,?\s*\\text\{\s*(?:and|or)\s*\}\s*")

_TEXT_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textrm)\{([A-Za-z .^/-]*[23]?)\}(?:\^\{?([23])\}?)?")
_PLAIN_UNIT = re.compile(r"([A-Za-z][A-Za-z ]*)(?:\^\{?([23])\}?)?")

_UNITS = {
    "mm": "millimeter",
    "cm": "centimeter",
    "km": "kilometer",
    "m": "meter",
    "in": "inch",
    "inches": "inch",
    "ft": "foot",
    "feet": "foot",
    "yd": "yard",
    "mi": "mile",
    "sec": "second",
    "s": "second",
    "min": "minute",
    "hr": "hour",
    "h": "hour",
    "g": "gram",
    "mg": "milligram",
    "kg": "kilogram",
    "lb": "pound",
    "oz": "ounce",
    "ml": "milliliter",
    "l": "liter",
    "mph": "mile per hour",
    "km/h": "kilometer per hour",
    "m/s": "meter per second",
    "metre": "meter",
    "centimetre": "centimeter",
    "kilometre": "kilometer",
    "litre": "liter",
}
"""Short and other spellings; any longer word in \\text{} is a unit as it stands."""
_LONG_UNITS = frozenset(_UNITS.values()) | {"degree", "dollar", "cent", "unit", "day", "week", "month", "year"}
_NOT_UNITS = frozenset(
    ("and", "or", "to", "of", "if", "for", "where", "when", "mod", "pi", "sqrt", "i", "e", "x", "y", "n")
    + ("half", "dozen", "hundred", "thousand", "million", "billion", "trillion")
)
"""Words that change what the number means."""


def tidy(text: str) -> str:
    """The same answer without dollar signs, sizing, spacing, a final full stop or braces around the whole."""
    text = _CONTROL.sub("", text).replace("\\$", "").replace("$", "").replace("\u2212", "-")
    text = _THOUSANDS_MARK.sub("", text)
    text = _AND.sub(",", text)
    text = _DEGREE.sub(r"\\text{degree}", text)
    text = _PERCENT.sub("%", text)
    text = _SIZING.sub("", _SPACING.sub(" ", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = _SPACE_AFTER_COMMAND.sub(r"\1", text)
    text = re.sub(r"\\frac([0-9])\s+(?=[0-9])", r"\\frac\1", text)
    # "1 2" keeps its space: it is not 12. Letters keep theirs: they may be words.
    text = _SPACE_TO_DROP.sub("", text.strip())
    text = text.removesuffix(".")
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    return text


def unit_of(text: str) -> str | None:
    """The unit that follows a number: "" for no text, None if the text is not (only) a unit."""
    text = text.strip()
    if not text:
        return ""
    if match := _TEXT_UNIT.fullmatch(text):
        name = _canonical(match[1])
        return name and name + (match[2] or "")
    if match := _PLAIN_UNIT.fullmatch(text):
        # Bare letters are variables unless they spell a unit; a single one may always be a variable.
        name = _canonical(match[1])
        return name + (match[2] or "") if name in _LONG_UNITS and len(match[1].strip()) > 1 else None
    return None


def _canonical(words: str) -> str | None:
    name = " ".join(words.casefold().replace(".", "").split())
    power = ""
    for written, mark in (("square ", "2"), ("cubic ", "3")):
        if name.startswith(written):
            name, power = name.removeprefix(written), mark
    if name[-1:] in ("2", "3"):
        name, power = name[:-1].rstrip("^"), name[-1]
    if not name or any(word in _NOT_UNITS for word in name.split()):
        return None
    name = _UNITS.get(name, name.removesuffix("s") if len(name) > 3 else name)
    name = _UNITS.get(name, name)
    return name + power if len(name) > 1 else None
