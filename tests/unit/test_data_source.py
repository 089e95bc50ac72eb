"""The training order is a seeded permutation that can be entered anywhere, and holds no held-out problem."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from orz_async.config import DataConfig
from orz_async.data.char_tokenizer import write_tokenizer
from orz_async.data.permutation import permuted
from orz_async.data.source import SeededPrompts, build, load_prompts, prompt_id
from orz_async.data.template import render
from orz_async.data.tokenizer import Tokenizer, load_tokenizer
from orz_async.errors import DataError, ModelError
from orz_async.records import Prompt, as_int32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=str(index), tokens=b"", answer="") for index in range(count)]


def write(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "answer": answer}) + "\n" for text, answer in rows))
    return str(path)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_each_epoch_is_a_permutation_and_no_two_are_alike(n: int) -> None:
    source = SeededPrompts(prompts(n), seed=3)
    epochs = [[source.prompt(epoch * n + position).prompt_id for position in range(n)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(index) for index in range(n)]
    if n >= 16:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != [str(index) for index in range(n)]


def test_the_order_is_a_function_of_seed_and_index_alone() -> None:
    whole = [SeededPrompts(prompts(10), seed=5).prompt(index).prompt_id for index in range(30)]
    # A source that begins at 17 goes on as if it had delivered the first 17.
    resumed = SeededPrompts(prompts(10), seed=5)
    assert [resumed.prompt(index).prompt_id for index in range(17, 30)] == whole[17:]
    assert [SeededPrompts(prompts(10), seed=6).prompt(index).prompt_id for index in range(30)] != whole


def test_the_order_is_fixed_for_ever() -> None:
    # A checkpoint's cursor is worthless if the order behind it changes with a version or a machine.
    assert [permuted(position, 10, key=(0, 0)) for position in range(10)] == [9, 5, 7, 1, 6, 4, 8, 3, 2, 0]


def test_every_value_is_equally_likely_at_every_place() -> None:
    n, keys = 7, 2100
    count = Counter((position, permuted(position, n, key=(key, 1))) for key in range(keys) for position in range(n))
    # 300 expected in each of 49 cells; five standard deviations of a binomial are 80.
    assert len(count) == n * n and all(abs(times - keys / n) < 80 for times in count.values())


def test_heldout_problems_are_removed_by_content_and_everything_is_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = DataConfig(
        train=write(
            tmp_path / "train.jsonl",
            ("Sum of 1 and 2?", "3"),
            ("sum  of 1 and 2? ", "3"),  # the same up to case and spacing
            ("Sum of 1 and 3?", "4"),
            ("Sum of 1 and 3?", "4"),
            ("x" * 60, "1"),
            ("Sum of 2 and 3?", "5"),
        ),
        heldout=write(tmp_path / "heldout.jsonl", ("SUM of 1 and 2?", "3")),
        max_prompt_tokens=40,
    )
    source, heldout = build(config, tokenizer, seed=0)
    assert {prompt.prompt_id for prompt in source.prompts} == {
        prompt_id("Sum of 1 and 3?"),
        prompt_id("Sum of 2 and 3?"),
    }
    counts = source.counts
    assert (counts.read, counts.duplicate, counts.held_out, counts.too_long, counts.kept) == (6, 1, 2, 1, 2)
    assert [prompt.answer for prompt in heldout] == ["3"]
    assert build(replace(config, heldout=""), tokenizer, seed=0)[1] == []


def test_a_file_without_a_usable_prompt_is_an_error_that_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "train.jsonl", ("a2b3=?", "5"))
    with pytest.raises(DataError, match=r"1 rows usable \(1 are held out, 0 have more"):
        build(DataConfig(train=path, heldout=path), tokenizer, seed=0)
    with pytest.raises(DataError, match=r"0 are held out, 1 have more than 3 tokens"):
        build(DataConfig(train=path, heldout="", max_prompt_tokens=3), tokenizer, seed=0)


def test_templates_open_the_thought_and_keep_the_problem_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    problem = "What is {x} in \\boxed{}?"
    rendered = {name: tokenizer.decode(render([problem], name, tokenizer)[0]) for name in ("orz", "chat", "plain")}
    assert rendered["chat"] == f"User:{problem}Assistant:<think>"
    assert rendered["plain"] == problem
    assert rendered["orz"].endswith(f"\nUser: {problem}\nAssistant: <think>")
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{}"):
        assert tag in rendered["orz"].removesuffix(f"User: {problem}\nAssistant: <think>")
    [prompt] = load_prompts(write(tmp_path / "rows.jsonl", (problem, "7")), "chat", tokenizer, 64)
    assert tokenizer.decode(as_int32(prompt.tokens).tolist()) == rendered["chat"]


def test_a_directory_without_a_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a model directory at .*absent, found nothing"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"expected a loadable tokenizer .* found weights.bin"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"expected a loadable tokenizer .* copy the tokenizer files"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_explained(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r'chat template, found none .* set data.template to "orz"'):
        render(["a"], "chat", load_tokenizer(tmp_path))
