"""The base model: equal seeds give equal bits, held-out problems stay out, and a folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from orz_async.data import digit_sum
from orz_async.data.char_tokenizer import write_tokenizer
from orz_async.data.files import read_problems
from orz_async.data.source import content_key
from orz_async.data.tokenizer import Tokenizer, load_tokenizer
from orz_async.errors import ConfigError
from orz_async.learner import base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "HELDOUT_PROBLEMS", 20)
    monkeypatch.setattr(base, "TRAIN_PROBLEMS", 100)
    monkeypatch.setattr(base, "MAX_NEW_TOKENS", 8)


def digest(folder: Path) -> dict[str, str]:
    """Of every file but the report, which holds a duration."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "base.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.usefixtures("small")
def test_equal_seeds_give_equal_bits_and_a_directory_that_loads(tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected_draw = torch.rand(1)
    torch.manual_seed(123)
    said: list[float] = []
    report = base.make_base(tmp_path / "a", seed=1, steps=3, progress=lambda what, fraction: said.append(fraction))
    assert torch.rand(1) == expected_draw, "the caller's random state was changed"
    base.make_base(tmp_path / "b", seed=1, steps=3)
    base.make_base(tmp_path / "c", seed=2, steps=3)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a")["model/model.safetensors"] != digest(tmp_path / "c")["model/model.safetensors"]
    assert json.loads((tmp_path / "a" / "base.json").read_text()) == report
    assert report["heldout"]["samples"] == 20
    assert said == sorted(said) and said[-1] == 1.0

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert model.config.vocab_size == len(load_tokenizer(tmp_path / "a" / "model"))
    train = {content_key(problem.text) for problem in read_problems(tmp_path / "a" / "train.jsonl")}
    heldout = {content_key(problem.text) for problem in read_problems(tmp_path / "a" / "heldout.jsonl")}
    assert (len(train), len(heldout), len(train & heldout)) == (100, 20, 0)


@pytest.mark.usefixtures("small")
def test_an_existing_folder_is_kept_unless_forced_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "base"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ConfigError, match=r"expected .*base not to exist, found it"):
        base.make_base(out, steps=1)

    def break_off(what: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.make_base(out, steps=1, force=True, progress=break_off)
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "precious"]
    base.make_base(out, steps=1, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert sorted(path.name for path in out.iterdir()) == ["base.json", "heldout.jsonl", "model", "train.jsonl"]


def test_heldout_problems_never_reach_the_corpus_and_only_responses_carry_loss(tokenizer: Tokenizer) -> None:
    heldout = frozenset(itertools.product(range(10), repeat=3))
    assistant, end = tokenizer.encode("Assistant:<think>"), tokenizer.eos_token_id
    for tokens_BT, targets_BT in base.batches(tokenizer, heldout, seed=0, steps=20):
        for tokens, targets in zip(tokens_BT.tolist(), targets_BT.tolist(), strict=True):
            start = tokens.index(assistant[-1]) + 1
            assert tokens[start - 2 : start] == assistant
            digits = tokenizer.decode(tokens[:start]).count
            assert sum(map(digits, "0123456789")) > 3
            stop = tokens.index(end) + 1
            assert targets == [base.IGNORED] * start + tokens[start:stop] + [base.IGNORED] * (len(tokens) - stop)
            assert tokenizer.decode(tokens[stop - 2 : stop - 1]) == digit_sum.STOP


def test_the_cached_loop_samples_what_a_plain_one_does(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = base.new_model().eval()
    with torch.no_grad():
        # A sharp distribution makes sampling deterministic, so that the two loops must agree; large weights in the
        # layers make the responses differ.
        model.model.norm.weight.mul_(1e4)
        for layer in model.model.layers:
            for weight in layer.parameters():
                weight.normal_(std=0.3)
    prompts = [tokenizer.encode(f"User:{text}=?") for text in ("a1b2c3", "a4b5c6", "a7b8c9", "a0b0c0")]
    responses = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(20):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        responses.append(tokens[len(prompt) :])
    # A token from the middle of one response stops that row early, while others go on.
    stop = responses[0][10]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in responses]
    sampled = base.sample(model, prompts, stop, torch.Generator().manual_seed(0))
    assert [row[:20] for row in sampled] == expected
    assert len({len(row) for row in expected}) > 1
