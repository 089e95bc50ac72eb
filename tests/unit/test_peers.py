"""The peers benchmark: what TRL is given is what our recipe is given, and the arithmetic of its figures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import long_tail, peer_trl, peers, run
from benchmarks.peer_trl import Clock, Options
from orz_async.config import DataConfig
from orz_async.data import digit_sum
from orz_async.data.char_tokenizer import write_tokenizer
from orz_async.data.source import build
from orz_async.data.tokenizer import load_tokenizer
from orz_async.learner.optim import Schedule
from orz_async.recipes import tiny_cpu
from orz_async.records import as_int32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `orz make-base` writes, without weights."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "model").mkdir()
    write_tokenizer(folder / "model")
    heldout = digit_sum.draw_heldout(20, seed=0)
    for name, drawn in (("heldout", heldout), ("train", digit_sum.draw_train(50, 0, frozenset(heldout)))):
        rows = ({"prompt": digit_sum.problem(digits), "answer": digit_sum.solution(digits)} for digits in drawn)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_prompts_are_ours_in_our_order(base: Path) -> None:
    tokenizer = load_tokenizer(base / "model")
    options = Options(base=base, steps=3, prompts=32, seed=5, eval_prompts=7)  # more prompts than an epoch has
    rows, heldout = peer_trl.problems(options, tokenizer)
    data = DataConfig(
        train=str(base / "train.jsonl"), heldout=str(base / "heldout.jsonl"), max_prompt_tokens=64, template="chat"
    )
    source, ours = build(data, tokenizer, 5)
    assert len(rows) == 96
    for index, row in enumerate(rows):
        assert tokenizer([row["prompt"]])["input_ids"][0] == as_int32(source.prompt(index).tokens).tolist()
        assert row["answer"] == source.prompt(index).answer
    assert heldout == ours[:7]


def test_the_reward_is_our_rule(base: Path) -> None:
    tokenizer = load_tokenizer(base / "model")
    end_tokens = peer_trl.ends(tokenizer)
    good = "a1=1;</think><answer>\\boxed{7}</answer>"
    for text, answer, reward in (
        (good, "7", 1.0),
        (good, "8", 0.0),
        (good[:-1], "7", 0.0),  # cut by the length limit before the answer was closed
        ("7", "7", 0.0),
        ("</think><answer>\\boxed{b}</answer>", "7", 0.0),
        ("</think><answer>7</answer>", "7", 0.0),
    ):
        tokens = tokenizer.encode(text)
        assert peer_trl.score(text, answer, tokens, end_tokens) == reward
    tokens = tokenizer.encode(good)
    assert peer_trl.score(good, "7", tokens[:-1], end_tokens) == 0.0  # the text is not what says that it stopped
    assert peer_trl.score(good, "7", [*tokens[:-1], end_tokens[0]], end_tokens) == 1.0
    assert peer_trl.cut([5, 6, end_tokens[1], 9, end_tokens[0]], end_tokens) == [5, 6, end_tokens[1]]
    assert peer_trl.cut([5, 6], end_tokens) == [5, 6]


def test_settings_are_those_of_the_recipe(base: Path) -> None:
    recipe, options = tiny_cpu(), Options(base=base, steps=80)
    trl = peer_trl.settings(options)
    assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == recipe.broker.rollouts_per_step
    assert trl["num_generations"] == recipe.broker.samples_per_prompt
    assert trl["max_completion_length"] == recipe.sampling.max_new_tokens
    assert trl["temperature"] == recipe.sampling.temperature == recipe.eval.temperature
    assert trl["epsilon"] == recipe.learner.clip_low == recipe.learner.clip_high
    assert trl["max_grad_norm"] == recipe.learner.grad_clip
    assert trl["num_iterations"] == recipe.learner.policy_steps
    assert (trl["loss_type"], recipe.learner.loss_aggregation) == ("dapo", "token")  # both: a mean over all tokens
    assert (options.lr, options.lr_final) == (recipe.learner.lr, recipe.learner.lr_final)
    assert options.eval_prompts == recipe.eval.prompts
    assert recipe.sampling.stop == (peer_trl.STOP,)
    assert recipe.learner.adam_betas == peer_trl.BETAS
    schedule = Schedule(1.0, recipe.learner.warmup_steps, 0.1, 80)
    assert [peer_trl.fraction(step, options) for step in (0, 40, 79)] == [schedule.at(step) for step in (0, 40, 79)]


def test_rates_are_over_whole_bursts() -> None:
    assert tiny_cpu().broker.max_lag == peers.MAX_LAG
    assert peers.WARM_STEPS % (peers.MAX_LAG + 1) == peers.STEPS % (peers.MAX_LAG + 1) == 0


def test_evaluations_are_not_on_the_clock() -> None:
    times = iter([100.0, 103.0, 110.0, 111.0])
    clock = Clock(now=lambda: next(times))
    clock.start()
    assert clock.leave_out(lambda: "found") == "found"  # from 103 to 110
    assert clock.read() == 4.0


RECORD = {
    "steps": [{"wall_s": 2.0 + step, "tokens": 1280.0, "longest": 40.0 + step} for step in range(8)],
    "evals": [{"version": v, "wall_s": 0.0, "accuracy": a} for v, a in ((0.0, 0.3), (4.0, 0.91), (8.0, 0.89))],
}


def test_a_course_of_trl() -> None:
    course = peers.trl_course(json.loads(json.dumps(RECORD)))
    assert course.rate() == pytest.approx(128.0)  # 4 updates in the 4 seconds after the warm-up
    assert course.seconds_to(0.9) == 5.0  # version 4 stood when update 3 ended
    assert course.seconds_to(0.95) is None
    assert course.seconds_to(0.1) == 0.0
    assert (course.mean_tokens, course.longest) == (10.0, 47.0)


def test_a_course_of_ours() -> None:
    steps = {n: {"wall_s": 1.0 + n / 2, "length_mean": 10.0 + n, "length_max": 50 - n} for n in (1, 0, 2, 3, 4, 5)}
    free = {n: {"wall_s": 1.0 + n / 4} for n in range(6)}
    course = peers.our_course(steps, {5: {"accuracy": 0.9}, 0: {"accuracy": 0.2}}, free)
    assert course.step_s == (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    assert course.rate() == pytest.approx(512.0)  # of the run without evaluations
    assert course.seconds_to(0.9) == 3.0
    assert (course.mean_tokens, course.longest) == (12.5, 50.0)


def course(step_s: float, good: int | None) -> peers.Course:
    accuracy = {0: 0.2} if good is None else {0: 0.2, good: 0.95}
    ends = tuple(step_s * (n + 1) for n in range(10))
    return peers.Course(ends, accuracy, 20.0, 40.0, free_s=ends)


def test_ratios_are_taken_turn_by_turn() -> None:
    courses = {
        ("demo", peers.GRPO): [course(0.5, 4), course(0.4, 5)],
        ("demo", peers.TRL): [course(1.0, 5), course(1.2, 5)],
        ("demo", peers.PPO): [course(2.0, None), course(1.0, 10)],
        ("long tail", peers.TRL): [course(3.0, None)],
    }
    rows = {(r["name"], r["variant"]): r for r in peers.rows_of(courses, ["demo, ours, seed 7"])}
    assert rows["peers, demo", peers.GRPO]["ratio_to_first"] == pytest.approx((2.0 + 3.0) / 2)
    assert rows["peers, demo", peers.TRL]["ratio_to_first"] == 1.0
    assert rows["peers, demo, to 90%", peers.GRPO]["ratio_to_first"] == pytest.approx((5 / 2 + 6 / 2) / 2)
    assert rows["peers, demo, to 90%", peers.PPO]["ratio_to_first"] == pytest.approx(0.6)  # seed 1 alone reached it
    assert rows["peers, demo, to 90%", peers.PPO]["n"] == 1
    assert rows["peers, demo", peers.PPO]["notes"]["missing"] == ["demo, ours, seed 7"]
    assert rows["peers, demo", peers.GRPO]["notes"]["missing"] == []
    assert rows["peers, long tail", peers.TRL]["notes"]["not_reached"] == [0.2]
    assert ("peers, long tail, to 90%", peers.TRL) not in rows


def test_some_responses_of_the_long_tail_are_long() -> None:
    rng = random.Random(0)
    texts = [long_tail.respond((1, 2, 3, 4), rng) for _ in range(4000)]
    long = [text for text in texts if text.startswith(long_tail.OPENING)]
    assert len(long) / len(texts) == pytest.approx(long_tail.SHARE, abs=0.02)
    assert all(text.endswith(digit_sum.STOP) for text in texts)
    lengths = sorted(len(text) for text in long)
    assert lengths[len(lengths) // 2] > 80
    assert lengths[-1] <= long_tail.LONGEST + 40


def test_without_its_environment_the_suite_says_so_and_all_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interpreter = tmp_path / "python"
    monkeypatch.setattr(peers, "PYTHON", interpreter)
    with pytest.raises(SystemExit, match="make peers-dev"):
        peers.run()
    others = [suite for suite in run.SUITES if suite not in ("vllm", "peers")]
    assert run.available() == others
    assert "peers is left out" in capsys.readouterr().out
    interpreter.touch()
    assert run.available() == [*others, "peers"]


def test_a_turn_for_which_there_is_no_time_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").touch()
    monkeypatch.setattr(peers, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(peers, "LONG", tmp_path)
    monkeypatch.setattr(peers, "ensure_base", lambda: None)
    monkeypatch.setattr(peers, "BUDGET_S", 100.0)
    now = [0.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])

    def measured(task: peers.Task, seed: int, place: Path, side: str = peers.TRL) -> peers.Course:
        now[0] += 18.0 if side == peers.TRL else 12.0
        return course(1.0, 5)

    monkeypatch.setattr(peers, "trl", measured)
    monkeypatch.setattr(peers, "ours", measured)
    rows = peers.run()  # two tasks of 42 s, then 12 s of the third go
    notes = {(r["name"], r["variant"]): r["notes"] for r in rows if r["unit"] == "rollouts/s"}
    assert notes["peers, demo", peers.GRPO]["missing"] == []
    assert notes["peers, demo", peers.TRL]["missing"] == ["demo, trl, seed 1"]
    assert notes["peers, long tail", peers.TRL]["missing"] == ["long tail, trl, seed 1"]
