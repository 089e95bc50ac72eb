"""The base model: equal seeds give equal bits, held-out problems stay out, and a folder appears whole or not at all."""

from __future__ import annotations

import dataclasses
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
from orz_async.learner.base_plan import PLANS, SMALL, TINY, BasePlan


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory)


FEW = dataclasses.replace(TINY, heldout_problems=20, train_problems=100, max_new_tokens=8)
FEW_SMALL = dataclasses.replace(
    SMALL,
    hidden=64,
    intermediate=64,
    layers=2,
    heads=1,
    batch=4,
    heldout_problems=20,
    train_problems=100,
    max_new_tokens=8,
)
"""The GPU recipe's base, cut down."""


def digest(folder: Path) -> dict[str, str]:
    """Of every file but the report, which holds a duration."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "base.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("plan", "dtype"), [(FEW, "float32"), (FEW_SMALL, "bfloat16")], ids=["tiny", "small"])
def test_equal_seeds_give_equal_bits_and_a_directory_that_loads(tmp_path: Path, plan: BasePlan, dtype: str) -> None:
    torch.manual_seed(123)
    expected_draw = torch.rand(1)
    torch.manual_seed(123)
    said: list[float] = []
    report = base.make_base(
        tmp_path / "a", plan=plan, seed=1, steps=3, dtype=dtype, progress=lambda what, fraction: said.append(fraction)
    )
    assert torch.rand(1) == expected_draw, "the caller's random state was changed"
    base.make_base(tmp_path / "b", plan=plan, seed=1, steps=3, dtype=dtype)
    base.make_base(tmp_path / "c", plan=plan, seed=2, steps=3, dtype=dtype)
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


def test_an_existing_folder_is_kept_unless_forced_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "base"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ConfigError, match=r"expected .*base not to exist, found it"):
        base.make_base(out, plan=FEW, steps=1)

    def break_off(what: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.make_base(out, plan=FEW, steps=1, force=True, progress=break_off)
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "precious"]
    base.make_base(out, plan=FEW, steps=1, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert sorted(path.name for path in out.iterdir()) == ["base.json", "heldout.jsonl", "model", "train.jsonl"]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_has_the_size_it_says(plan: BasePlan) -> None:
    with torch.device("meta"):
        model = base.new_model(plan)
    assert plan.shape.policy == sum(parameter.numel() for parameter in model.parameters())
    assert plan.name == "tiny" or 30e6 < plan.shape.policy < 100e6


def test_heldout_problems_never_reach_the_corpus_and_only_responses_carry_loss(tokenizer: Tokenizer) -> None:
    heldout = frozenset(itertools.product(range(10), repeat=3))
    assistant, end = tokenizer.encode("Assistant:<think>"), tokenizer.eos_token_id
    for tokens_BT, targets_BT in base.batches(tokenizer, heldout, TINY, seed=0, steps=20):
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
    sampled = base.sample(model, prompts, stop, torch.Generator().manual_seed(0), max_new_tokens=96)
    assert [row[:20] for row in sampled] == expected
    assert len({len(row) for row in expected}) > 1
