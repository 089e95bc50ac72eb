"""Problem files: both formats are read, and every defect is named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orz_async.data import files
from orz_async.data.files import Problem, read_problems
from orz_async.errors import DataError

GOOD = '{"prompt": "a", "answer": "1"}'


def orz_row(text: object, answer: object) -> list[object]:
    return [{"from": "human", "value": text}, {"from": "assistant", "ground_truth": {"value": answer}}]


def test_orz_json_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "orz.json"
    path.write_text(json.dumps([orz_row("What is 1+1?", "2"), orz_row("\u00dcber?", "\\frac{1}{2}")], indent=2))
    assert read_problems(path) == [Problem("What is 1+1?", "2"), Problem("\u00dcber?", "\\frac{1}{2}")]


def test_jsonl_is_read_and_rows_of_both_forms_may_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b", "answer": "2", "level": 3}, orz_row("c", "4"), {"prompt": "d", "answer": 5}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    assert read_problems(path) == [Problem("a\u2028b", "2"), Problem("c", "4"), Problem("d", "5")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", f'{GOOD}\n{{"prompt": "b"\n', r"rows.jsonl:2: expected one JSON value a line"),
        ("rows.jsonl", f'{GOOD}\n\n{{"prompt": "b"}}\n', r"rows.jsonl:3: .* found an object with prompt: str;"),
        ("rows.jsonl", '{"prompt": "a", "answer": ["1"]}', r"rows.jsonl:1: expected .*answer: list"),
        ("rows.jsonl", '{"prompt": "a", "answer": true}', r"rows.jsonl:1: expected .*answer: bool"),
        ("rows.jsonl", '{"prompt": " ", "answer": "1"}', r"rows.jsonl:1: expected a problem of 1 to .* found 0"),
        ("rows.jsonl", '{"prompt": "a", "answer": ""}', r"rows.jsonl:1: expected an answer of 1 to .* found 0"),
        ("rows.jsonl", '{"prompt": "\\ud800", "answer": "1"}', r"rows.jsonl:1: .* lone surrogate"),
        ("rows.jsonl", '"just text"', r'rows.jsonl:1: expected .* found "just text"'),
        ("rows.jsonl", "[" * 100_000, r"rows.jsonl:1: expected one JSON value a line"),
        ("rows.jsonl", "\n \n", r"rows.jsonl: expected at least one row"),
        ("rows.json", "[]", r"rows.json: expected at least one row"),
        ("rows.json", GOOD, r"rows.json:1: expected a JSON list"),
        ("rows.json", f'[\n{GOOD},\n{{"prompt": }}]', r"rows.json:3: expected a JSON row"),
        ("rows.json", f'[\n{GOOD},\n\n{{"answer": "1"}}]', r"rows.json:4: .* found an object with answer: str;"),
        ("rows.json", f"[\n{GOOD}", r"rows.json:2: expected , or \] .* cut short"),
        ("rows.json", f"[{GOOD}] []", r"rows.json:1: expected nothing after the list"),
        ("rows.json", '[[{"from": "human", "value": "a"}, {"from": "assistant", "value": "1"}]]', r"rows.json:1: "),
        ("rows.json", json.dumps([[{"from": "gpt", "value": "a"}, orz_row("", "1")[1]]]), r"rows.json:1: expected"),
        ("rows.json", "[" * 100_000, r"rows.json:1: expected a JSON row"),
        ("rows.csv", "a,1", r"rows.csv: expected a file name ending in .json or .jsonl, found .csv"),
    ],
)
def test_a_defect_is_named_with_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_problems(tmp_path / name)


def test_a_missing_file_and_a_wrong_encoding_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: expected a readable file .* make-base"):
        read_problems(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xfcber", "answer": "1"}')
    with pytest.raises(DataError, match=r"expected UTF-8, found byte 0xfc at offset 12"):
        read_problems(tmp_path / "latin.jsonl")


def test_size_and_row_count_are_limited_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n" * 4)
    monkeypatch.setattr(files, "MAX_ROWS", 3)
    with pytest.raises(DataError, match=r"rows.jsonl:4: expected at most 3 rows"):
        read_problems(path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"expected at most 10 bytes, found 124"):
        read_problems(path)
