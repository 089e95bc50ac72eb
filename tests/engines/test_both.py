"""What the daemon relies on, of whichever engine: tokens, log-probs, versions, stops, and weights in flight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orz_async.errors import EngineError
from orz_async.generator.engine import LeaseError, ref_of
from orz_async.records import Span
from orz_async.weights.snapshot import state_digest
from tests.engines.kit import VOCAB, Make, lease, recomputed, run, run_until, span_errors, tensors, text

EXACT = 1e-5
"""Promised to the learner: float32 sums of some dozen terms against float64."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_logprobs_are_those_of_the_model_at_the_temperature(make: Make) -> None:
    # More leases than slots, of unequal lengths and temperatures.
    leases = [lease(n, new=3 + 11 * n % 37, temperature=(1.0, 0.7, 1.6)[n % 3]) for n in range(12)]
    samples = run(make(), leases)
    assert sorted(samples) == list(range(12))
    for one in leases:
        sample = samples[one.rollout]
        assert len(sample.response) == one.sampling.max_new_tokens and sample.finish == "length"
        assert sample.spans == (Span(0, 0),) and sample.kv_version is None
        assert np.abs(recomputed(0, sample) - sample.logprobs).max() <= EXACT


def test_a_long_rollout_over_three_updates_has_the_logprobs_of_each(make: Make) -> None:
    engine = make()
    for n in range(6):
        engine.submit(lease(n, new=130))
    for version in (3, 4, 7):
        run_until(engine, 6 * 25)
        engine.apply(version, tensors(version))
    samples = run(engine)
    assert len(samples) == 6
    for sample in samples.values():
        assert [span.version for span in sample.spans] == [0, 3, 4, 7]
        assert len(sample.response) == 130 and sample.spans[0].start == 0
        assert max(span_errors(sample)) <= EXACT
        # The proof can fail: under the first version the last span looks quite different.
        last = sample.spans[-1].start
        assert np.abs(recomputed(0, sample) - sample.logprobs)[last:].max() > 0.05


def test_kept_keys_are_stale_and_said_to_be(make: Make) -> None:
    engine = make(keep_kv=True)
    for n in range(4):
        engine.submit(lease(n, new=60))
    run_until(engine, 80)
    engine.apply(5, tensors(5))
    sample = run(engine)[2]
    assert [span.version for span in sample.spans] == [0, 5] and sample.kv_version == 0
    start = sample.spans[1].start
    assert (sample.kv_age_T()[:start] == 0).all() and (sample.kv_age_T()[start:] == 5).all()
    assert np.abs(recomputed(5, sample) - sample.logprobs)[start:].max() > 1e-3
    # What starts afterwards sees nothing of the old keys, though it has the same prompt.
    fresh = run(engine, [lease(2, new=30)])[2]
    assert fresh.spans == (Span(5, 0),) and not fresh.kv_age_T().any()
    assert np.abs(recomputed(5, fresh) - fresh.logprobs).max() <= EXACT


def test_the_next_version_does_not_reuse_a_prompt_of_the_last(make: Make) -> None:
    engine, prompt = make(), list(range(40))
    for version in (0, 1, 2):
        if version:
            engine.apply(version, tensors(version))
        for sample in run(engine, [lease(n, prompt=prompt) for n in range(4)]).values():
            assert np.abs(recomputed(version, sample) - sample.logprobs).max() <= EXACT


def test_the_seed_decides_the_tokens(make: Make) -> None:
    engine = make()
    leases = [lease(n, prompt=[1, 2, 3], seed=n // 2) for n in range(6)]
    samples = run(engine, leases)
    for n in (0, 2, 4):
        assert samples[n].response.tolist() == samples[n + 1].response.tolist()
    assert len({samples[n].response.tobytes() for n in range(6)}) == 3


def test_eos_ends_a_response_and_belongs_to_it(make: Make) -> None:
    samples = run(make(eos=range(0, VOCAB, 6)), [lease(n, new=100) for n in range(8)])
    assert len(samples) == 8
    for sample in samples.values():
        assert sample.finish == "stop" and sample.response[-1] % 6 == 0
        assert (sample.response[:-1] % 6 != 0).all() and len(sample.logprobs) == len(sample.response)


def test_a_stop_string_ends_a_response_at_the_token_that_completes_it(make: Make) -> None:
    plain = run(make(), [lease(n, new=80) for n in range(8)])
    stop = text(plain[4].response[20:23].tolist())
    stopped = run(make(stop=(stop, "never~")), [lease(n, new=80) for n in range(8)])
    assert stopped[4].finish == "stop"
    assert stopped[4].response.tolist() == plain[4].response[:23].tolist()
    np.testing.assert_allclose(stopped[4].logprobs, plain[4].logprobs[:23], atol=EXACT, rtol=0)
    for n in range(8):
        if stop not in text(plain[n].response.tolist()):
            assert stopped[n].response.tolist() == plain[n].response.tolist() and stopped[n].finish == "length"


def test_a_stop_string_that_is_one_token(make: Make) -> None:
    leases = [lease(n, new=120) for n in range(8)]
    plain = run(make(), leases)
    stopped = run(make(stop=("</end>",)), leases)
    ended = 0
    for n in range(8):
        response = plain[n].response.tolist()
        if VOCAB - 1 in response:
            response, ended = response[: response.index(VOCAB - 1) + 1], ended + 1
        assert stopped[n].response.tolist() == response
        assert stopped[n].finish == ("stop" if response[-1] == VOCAB - 1 else "length")
    assert ended


def test_a_stop_at_the_limit_is_a_stop(make: Make) -> None:
    two = run(make(), [lease(1, new=2)])[1]
    assert two.finish == "length"
    assert run(make(stop=(text(two.response.tolist()),)), [lease(1, new=2)])[1].finish == "stop"
    assert run(make(eos=[int(two.response[1])]), [lease(1, new=2)])[1].finish == "stop"


def test_a_cancelled_lease_is_forgotten_and_the_others_lose_nothing(make: Make) -> None:
    leases = [lease(n, new=60) for n in range(8)]
    expected = run(make(), leases)
    engine = make(slots=4)
    for one in leases:
        engine.submit(one)
    run_until(engine, 40)
    partial = engine.cancel(ref_of(leases[1]))  # running
    assert engine.cancel(ref_of(leases[6])) is None  # queued
    assert engine.cancel(ref_of(lease(99))) is None  # unknown
    assert {progress.lease.rollout for progress in engine.progress()} == {0, 2, 3, 4, 5, 7}
    # What it had is handed back, as it would have gone on.
    assert partial is not None and partial.lease == leases[1] and partial.spans == (Span(0, 0),)
    assert 0 < len(partial.response) == len(partial.logprobs) < 60
    assert partial.response.tolist() == expected[1].response[: len(partial.response)].tolist()
    np.testing.assert_allclose(partial.logprobs, expected[1].logprobs[: len(partial.response)], atol=EXACT, rtol=0)
    samples = run(engine)
    assert samples.keys() == expected.keys() - {1, 6}
    for n, sample in samples.items():
        assert sample.response.tolist() == expected[n].response.tolist()


def test_a_partial_has_the_versions_of_its_tokens(make: Make) -> None:
    engine = make()
    engine.submit(lease(0, new=140))
    run_until(engine, 20)
    engine.apply(3, tensors(3))
    run_until(engine, 20)
    partial = engine.cancel(ref_of(lease(0)))
    assert partial is not None and engine.idle
    assert [span.version for span in partial.spans] == [0, 3]
    assert 0 < partial.spans[1].start < len(partial.response)
    run(engine, [lease(1, new=4)])  # and the engine goes on
    engine.submit(lease(2, new=40))
    assert (early := engine.cancel(ref_of(lease(2)))) is None or len(early.response) < 40
    assert engine.idle


def test_evaluations_are_admitted_first(make: Make) -> None:
    engine = make(slots=2)
    for n in range(4):
        engine.submit(lease(n, kind="eval" if n >= 2 else "train", new=100))
    run_until(engine, 4)
    running = {(one.lease.kind, one.lease.rollout) for one in engine.progress() if not one.queued}
    assert running == {("eval", 2), ("eval", 3)}
    run(engine)


def test_progress_grows_and_ends(make: Make) -> None:
    engine = make(slots=1)
    engine.submit(lease(0, prompt=[1, 2, 3], new=90))
    engine.submit(lease(1))
    assert not engine.idle
    before = engine.tokens_sampled
    run_until(engine, 5)
    first = engine.progress()
    assert [(one.lease.rollout, one.queued) for one in first] == [(0, False), (1, True)]
    assert first[0].tokens >= 3 + 5
    run_until(engine, 5)
    assert engine.progress()[0].tokens > first[0].tokens
    run(engine)
    assert engine.idle and not engine.progress() and engine.tokens_sampled == before + 110


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lease(0, prompt=[1] * 150, new=20), "exceed max_model_tokens 160"),
        (lease(0, prompt=[]), "at least one prompt token"),
        (lease(0, prompt=[1, VOCAB]), "outside the vocabulary"),
        (lease(0, new=0), "one new"),
    ],
)
def test_a_lease_that_can_never_run_is_refused(make: Make, bad: object, reason: str) -> None:
    engine = make()
    with pytest.raises(LeaseError, match=reason):
        engine.submit(bad)  # type: ignore[arg-type]
    assert engine.idle
    assert len(run(engine, [lease(1, prompt=[1] * 60, new=20)])[1].response) == 20


def test_apply_reports_the_digest_and_takes_tied_names(make: Make) -> None:
    engine, given = make(), tensors(9)
    digest = state_digest(given)
    assert engine.apply(1, given) == digest
    tied = {"lm_head.weight" if name == "model.embed_tokens.weight" else name: one for name, one in given.items()}
    assert engine.apply(2, tied) == digest
    assert engine.version == 2
    sample = run(engine, [lease(0)])[0]
    assert np.abs(recomputed(9, sample) - sample.logprobs).max() <= EXACT


def test_apply_is_all_or_nothing(make: Make) -> None:
    engine, good, norm = make(), tensors(9), "model.norm.weight"
    bad = {
        "tensors are missing, first 'model.norm.weight'": {n: t for n, t in good.items() if n != norm},
        "unexpected tensor 'extra'": good | {"extra": torch.zeros(1)},
        r"'model.norm.weight': expected shape \(128,\), found \(129,\)": good | {norm: torch.zeros(129)},
        "'model.norm.weight' .* not finite": good | {norm: good[norm] * math.nan},
        "'lm_head.weight' differs": good | {"lm_head.weight": good["model.embed_tokens.weight"] + 1},
    }
    for message, given in bad.items():
        with pytest.raises(EngineError, match=message):
            engine.apply(1, given)
    assert engine.version == 0
    sample = run(engine, [lease(0)])[0]
    assert sample.spans == (Span(0, 0),)
    assert np.abs(recomputed(0, sample) - sample.logprobs).max() <= EXACT


def test_versions_grow_while_rollouts_run(make: Make) -> None:
    engine = make()
    engine.submit(lease(0, new=100))
    run_until(engine, 2)
    with pytest.raises(EngineError, match="above 0 while sequences run, found 0"):
        engine.apply(0, tensors(1))
    run(engine)
    engine.apply(4, tensors(1))
    engine.apply(2, tensors(2))  # a learner that resumed from a checkpoint begins below
    assert engine.version == 2 and run(engine, [lease(0)])[0].spans == (Span(2, 0),)
