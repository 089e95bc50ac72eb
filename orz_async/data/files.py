"""Reads problem files: ORZ JSON and JSONL. A bad row is an error that names its file and line, never skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orz_async.errors import DataError

MAX_FILE_BYTES = 1 << 30
MAX_ROWS = 2_000_000
MAX_PROBLEM_CHARS = 100_000
MAX_ANSWER_CHARS = 4_096

ROW_FORMS = (
    'either {"prompt": TEXT, "answer": TEXT}, the ORZ evaluation form '
    '{"prompt": [{"value": TEXT}], "final_answer": TEXT}, or the ORZ form '
    '[{"from": "human", "value": TEXT}, {"from": "assistant", "ground_truth": {"value": TEXT}}]'
)


class Problem(NamedTuple):
    text: str
    answer: str


def read_problems(path: str | Path) -> list[Problem]:
    """All rows of a .jsonl file (one row a line) or a .json file (a list of rows), in file order."""
    path = Path(path)
    text = _read(path)
    rows = _jsonl_rows(path, text) if path.suffix == ".jsonl" else _json_rows(path, text)
    problems: list[Problem] = []
    for line, row in rows:
        if len(problems) == MAX_ROWS:
            raise DataError(f"{path}:{line}: expected at most {MAX_ROWS} rows, found more; split the file")
        problems.append(_problem(row, f"{path}:{line}"))
    if not problems:
        raise DataError(f"{path}: expected at least one row, found none; write rows as {ROW_FORMS}")
    return problems


def _read(path: Path) -> str:
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(
            f"{path}: expected a file name ending in .json or .jsonl, found {path.suffix or 'no ending'}; "
            "convert or rename it"
        )
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}; split the file")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: expected a readable file of problems, found: {error.strerror}; "
            "make the demo's with `orz make-base`, or set data.train and data.heldout"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, found byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "save the file as UTF-8"
        ) from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): it also breaks at U+2028 and others, which JSON strings may hold as they are.
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{path}:{line}: expected one JSON value a line, found: {error}; mend the row"
                ) from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a top-level list, decoded one by one so that each one's line is known."""
    decode = json.JSONDecoder().raw_decode
    position, line = _skip_space(text, 0), 1
    if text[position : position + 1] != "[":
        raise DataError(
            f"{path}:1: expected a JSON list of rows, found {text[position : position + 1]!r} first; "
            "rename the file to .jsonl if it has one row a line"
        )
    counted, separator = 0, "["
    while separator != "]":
        start = _skip_space(text, position + 1)
        if separator == "[" and text[start : start + 1] == "]":
            position = start
            break
        line, counted = line + text.count("\n", counted, start), start
        try:
            row, end = decode(text, start)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{line}: expected a JSON row, found: {error}; mend the file") from error
        yield line, row
        position = _skip_space(text, end)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            raise DataError(
                f"{path}:{line}: expected , or ] after the row that begins here, "
                f"found {separator or 'the end of the file'!r}; mend the file, it may be cut short"
            )
    if (rest := text[position + 1 :].strip()) != "":
        raise DataError(f"{path}:{line}: expected nothing after the list, found {rest[:40]!r}; mend the file")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _problem(row: Any, where: str) -> Problem:
    text, answer = _fields(row)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(text, str) or not isinstance(answer, str):
        raise DataError(f"{where}: expected {ROW_FORMS}, found {_excerpt(row)}; mend the row")
    for name, value, limit in (("a problem", text, MAX_PROBLEM_CHARS), ("an answer", answer, MAX_ANSWER_CHARS)):
        if not value.strip() or len(value) > limit:
            raise DataError(
                f"{where}: expected {name} of 1 to {limit} characters, found {len(value.strip())}; remove the row"
            )
        # A lone surrogate (an escape such as \ud800) is not text: it cannot be tokenized or written.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{where}: expected {name} of valid Unicode, found a lone surrogate; mend the row")
    return Problem(text, answer)


def _fields(row: Any) -> tuple[Any, Any]:
    if isinstance(row, dict):
        if "final_answer" in row:  # the ORZ evaluation form
            first = row["prompt"][0] if isinstance(row.get("prompt"), list) and row["prompt"] else None
            return (first.get("value") if isinstance(first, dict) else None), row["final_answer"]
        return row.get("prompt"), row.get("answer")
    if isinstance(row, list) and len(row) >= 2 and isinstance(row[0], dict) and isinstance(row[1], dict):
        truth = row[1].get("ground_truth")
        if row[0].get("from") == "human" and row[1].get("from") == "assistant" and isinstance(truth, dict):
            return row[0].get("value"), truth.get("value")
    return None, None


def _excerpt(row: Any) -> str:
    if isinstance(row, dict):
        return "an object with " + (
            ", ".join(f"{key}: {type(row[key]).__name__}" for key in sorted(row)[:8]) or "no names"
        )
    text = json.dumps(row)
    return text if len(text) <= 80 else text[:77] + "..."
