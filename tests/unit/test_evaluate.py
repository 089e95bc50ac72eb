"""pass@k against brute force, intervals that cover, results per problem, the ORZ evaluation form, `orz eval` whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orz_async import cli
from orz_async.data.char_tokenizer import write_tokenizer
from orz_async.data.files import Problem, read_problems
from orz_async.learner.base import new_model
from orz_async.observe.estimates import average, best_of, interval, pass_at_k


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_all_draws(case: tuple[int, int, int]) -> None:
    samples, correct, k = case
    outcomes = [1] * correct + [0] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_what_has_no_answer() -> None:
    for case in ((4, 2, 5), (4, 5, 2), (4, 2, 0)):
        with pytest.raises(ValueError, match="k <= n"):
            pass_at_k(*case)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    for samples in (1, 8):
        hits = 0
        for _ in range(200):
            skill_B = rng.beta(1, 2, 100)
            found = average(samples, rng.binomial(samples, skill_B).tolist())
            hits += found.low <= 1 / 3 <= found.high
        assert 0.88 <= hits / 200 <= 0.99
    assert interval([0.0] * 10).low == 0.0 < interval([0.0] * 10).high
    assert interval([0.25, 0.5, 1.0]) == interval([0.25, 0.5, 1.0])
    assert best_of(4, [0, 4], 2).value == 0.5


def test_orz_evaluation_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "aime.json"
    path.write_text(json.dumps([{"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2"}]))
    assert read_problems(path) == [Problem("1+1?", "2")]


def test_orz_eval_keeps_results_per_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tokenizer(model)
    new_model().save_pretrained(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(3)))
    words = ["eval", str(model), "--data", str(data), "--samples", "4", "--max-new-tokens", "6", "--stop", "</answer>"]
    assert cli.dispatch([*words, "--out", str(tmp_path / "one")]) == 0
    assert "avg@4" in (told := capsys.readouterr().out)
    assert "pass@2" in told
    rows = [json.loads(line) for line in (tmp_path / "one" / "problems.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["1", "2", "3"]
    assert all([made["sample"] for made in row["samples"]] == [0, 1, 2, 3] for row in rows)
    assert all(row["correct"] == sum(made["reward"] for made in row["samples"]) for row in rows)
    assert len({made["response"] for row in rows for made in row["samples"]}) > 6, "samples differ"
    found = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert (found["problems"], found["samples"], set(found["pass"])) == (3, 4, {"1", "2", "4"})
    assert cli.dispatch([*words, "--out", str(tmp_path / "two"), "--slots", "2"]) == 0
    again = (tmp_path / "two" / "problems.jsonl").read_text()
    assert again == (tmp_path / "one" / "problems.jsonl").read_text(), "the same with other neighbours in the batch"
