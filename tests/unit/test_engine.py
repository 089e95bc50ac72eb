"""The embedded engine: what it samples is what the model says, whatever else runs and whenever weights change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from generator_support import (
    MAX_TOKENS,
    VOCAB,
    finish,
    lease,
    make_engine,
    perturbed,
    plain_logprobs,
    tensors_of,
    tiny_model,
)

from orz_async.errors import ConfigError, EngineError, ModelError
from orz_async.generator.engine import LeaseError, Sample, ref_of
from orz_async.generator.kv_cache import KVCache
from orz_async.generator.sampler import uniforms
from orz_async.generator.transformers_engine import TransformersEngine
from orz_async.learner.parallel import full_state
from orz_async.ops import sample as draw
from orz_async.records import Span, as_int32
from orz_async.weights.snapshot import state_digest


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def assert_same(one: dict[int, Sample], other: dict[int, Sample]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for rollout, sample in one.items():
        assert sample.response.tobytes() == other[rollout].response.tobytes(), rollout
        assert sample.logprobs.tobytes() == other[rollout].logprobs.tobytes(), rollout
        assert (sample.spans, sample.finish) == (other[rollout].spans, other[rollout].finish)


# gemma2 and mistral: a sliding window of 6, shorter than the prompts; gemma2 has soft caps; llama grouped heads.
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma2"])
def test_logprobs_equal_a_plain_forward(architecture: str) -> None:
    model = tiny_model(architecture)
    # More leases than slots, of unequal lengths and temperatures: rows are freed, moved and filled again.
    leases = [lease(n, new=3 + 11 * n % 37, temperature=(1.0, 0.7, 1.6)[n % 3]) for n in range(12)]
    samples = finish(make_engine(model, slots=4), leases)
    assert len(samples) == 12
    for one in leases:
        sample = samples[one.rollout]
        assert len(sample.response) == one.sampling.max_new_tokens and sample.finish == "length"
        # float32 sums of 32 to 64 terms against float64: 1e-5 is the promise to the learner.
        np.testing.assert_allclose(sample.logprobs, plain_logprobs(model, sample), atol=1e-5, rtol=0)


def test_a_rollout_does_not_depend_on_its_neighbours() -> None:
    # Rollout 3 becomes three times as long as all that run beside it: its keys are then read on their own.
    leases = [lease(n, prompt=[n, 1, 2], new=75 if n == 3 else 5 + n % 20) for n in range(48)]
    together = finish(make_engine(slots=8), leases)
    alone: dict[int, Sample] = {}
    engine = make_engine(slots=8)
    for one in leases[3::8]:
        alone |= finish(engine, [one])
    assert_same({n: together[n] for n in alone}, alone)
    assert_same(together, finish(make_engine(slots=5), reversed(leases)))


def test_samples_of_one_prompt_share_its_prefill() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    leases = [lease(n, prompt=prompt) for n in range(6)]
    engine = make_engine()
    samples = finish(engine, leases)
    assert len({sample.response.tobytes() for sample in samples.values()}) == 6
    for one in leases:
        assert_same({one.rollout: samples[one.rollout]}, finish(engine, [one]))


def swapped(*, keep_kv: bool = False, prefill_tokens: int = 8192) -> dict[int, Sample]:
    """Eight leases, new weights after the fifth step and twice after the ninth."""
    engine = make_engine(keep_kv=keep_kv, prefill_tokens=prefill_tokens)
    samples: dict[int, Sample] = {}
    for n in range(8):
        engine.submit(lease(n, new=4 + 3 * n))
    steps = 0
    while not engine.idle:
        before = engine.tokens_sampled
        samples |= {sample.lease.rollout: sample for sample in engine.poll()}
        if engine.tokens_sampled == before:
            continue  # it recomputed keys and values
        steps += 1
        if steps == 5:
            engine.apply(3, tensors_of(perturbed(tiny_model(), 3, 0.1)))
        if steps == 9:
            engine.apply(4, tensors_of(perturbed(tiny_model(), 4, 0.2)))
            engine.apply(7, tensors_of(perturbed(tiny_model(), 7, 0.1)))
    return samples


def test_spans_say_which_version_sampled_a_token() -> None:
    samples = swapped()
    assert samples[0].spans == (Span(0, 0),) and len(samples[0].response) == 4
    assert samples[1].spans == (Span(0, 0), Span(3, 5)) and len(samples[1].response) == 7
    # Version 4 was replaced before it sampled a token.
    assert samples[7].spans == (Span(0, 0), Span(3, 5), Span(7, 9))


# 8192: all rows are recomputed in one forward; 20: a few at a time, and they are admitted so too.
@pytest.mark.parametrize("prefill_tokens", [8192, 20])
def test_each_span_has_the_logprobs_of_its_version(prefill_tokens: int) -> None:
    samples = swapped(prefill_tokens=prefill_tokens)
    models = {0: tiny_model(), 3: perturbed(tiny_model(), 3, 0.1), 7: perturbed(tiny_model(), 7, 0.1)}
    assert {span.version for span in samples[6].spans} == {0, 3, 7}
    for sample in samples.values():
        ends = [span.start for span in sample.spans[1:]] + [len(sample.response)]
        for span, end in zip(sample.spans, ends, strict=True):
            wanted = plain_logprobs(models[span.version], sample)[span.start : end]
            np.testing.assert_allclose(sample.logprobs[span.start : end], wanted, atol=1e-5, rtol=0)


def test_keep_kv_keeps_the_keys_of_older_weights() -> None:
    samples = swapped(keep_kv=True)
    assert samples[7].spans == (Span(0, 0), Span(3, 5), Span(7, 9))
    fresh = plain_logprobs(perturbed(tiny_model(), 7, 0.1), samples[7])[9:]
    assert np.abs(samples[7].logprobs[9:] - fresh).max() > 1e-3


def test_equal_submissions_and_swaps_give_equal_bits() -> None:
    assert_same(swapped(), swapped())


def test_tokens_are_drawn_by_seed_and_place_in_the_response() -> None:
    model = tiny_model()
    leases = [lease(n, temperature=0.8) for n in range(6)]
    samples = finish(make_engine(model), leases)
    model.set_attn_implementation("eager")
    for one in leases:
        sample = samples[one.rollout]
        start, steps = len(one.prompt) // 4, np.arange(20)
        tokens = torch.from_numpy(np.concatenate([as_int32(one.prompt), sample.response]).astype(np.int64))
        with torch.no_grad():
            logits_TV = model(input_ids=tokens[None], use_cache=False).logits[0, start - 1 : -1]
        draws_T = torch.from_numpy(uniforms(np.full(20, one.seed, np.uint64), steps))
        expected, _ = draw(logits_TV, torch.full((20,), 0.8), draws_T)
        assert expected.tolist() == sample.response.tolist()


def test_a_cancelled_row_may_be_replaced_by_one_that_waits_for_its_cache() -> None:
    engine = make_engine(prefill_tokens=40)
    leases = [lease(n, prompt=[n, 2, 3, 4, 5, 6], new=9) for n in range(6)]
    for one in leases:
        engine.submit(one)
    while engine.tokens_sampled < 24:
        engine.poll()
    engine.apply(1, tensors_of(perturbed(tiny_model(), 3, 0.1)))
    engine.poll()  # recomputes the cache of the first four rows, 9 tokens each
    engine.cancel(ref_of(leases[0]))
    samples = finish(engine)
    assert sorted(samples) == [1, 2, 3, 4, 5]
    for sample in samples.values():
        start = sample.spans[1].start
        wanted = plain_logprobs(perturbed(tiny_model(), 3, 0.1), sample)[start:]
        np.testing.assert_allclose(sample.logprobs[start:], wanted, atol=1e-5, rtol=0)


def test_eos_ends_a_response_and_belongs_to_it() -> None:
    samples = finish(make_engine(eos=range(0, VOCAB, 6)), [lease(n, new=60) for n in range(10)])
    for sample in samples.values():
        assert sample.finish == "stop" and sample.response[-1] % 6 == 0
        assert (sample.response[:-1] % 6 != 0).all()


def test_a_stop_string_of_several_tokens_ends_a_response() -> None:
    plain = finish(make_engine(), [lease(n, new=60) for n in range(10)])
    # Three consecutive tokens of rollout 4, as text; token n is the character 48 + n.
    stop = "".join(chr(48 + token) for token in plain[4].response[20:23])
    stopped = finish(make_engine(stop=(stop, "never~")), [lease(n, new=60) for n in range(10)])
    assert stopped[4].finish == "stop"
    assert stopped[4].response.tolist() == plain[4].response[:23].tolist()
    others = [n for n in range(10) if stop not in "".join(chr(48 + token) for token in plain[n].response)]
    assert others
    assert_same({n: plain[n] for n in others}, {n: stopped[n] for n in others})


def test_a_stop_at_the_limit_is_a_stop() -> None:
    token = int(finish(make_engine(), [lease(1, new=1)])[1].response[0])
    assert finish(make_engine(), [lease(1, new=1)])[1].finish == "length"
    assert finish(make_engine(eos=[token]), [lease(1, new=1)])[1].finish == "stop"


def test_cancelled_leases_leave_no_trace() -> None:
    leases = [lease(n, new=10 + n) for n in range(8)]
    expected = finish(make_engine(slots=4), [one for one in leases if one.rollout not in (1, 6)])
    engine = make_engine(slots=4)
    for one in leases:
        engine.submit(one)
    engine.poll()
    engine.cancel(ref_of(leases[1]))  # running
    engine.cancel(ref_of(leases[6]))  # queued
    engine.cancel(ref_of(lease(99)))  # unknown
    assert [progress.lease.rollout for progress in engine.progress()] == [0, 3, 2, 4, 5, 7]
    assert_same(finish(engine), expected)


def test_evaluations_are_admitted_first() -> None:
    engine = make_engine(slots=2)
    for n in range(4):
        engine.submit(lease(n, kind="eval" if n >= 2 else "train"))
    engine.poll()
    running = [(one.lease.kind, one.lease.rollout) for one in engine.progress() if not one.queued]
    assert running == [("eval", 2), ("eval", 3)]


def test_progress_grows_with_all_work() -> None:
    engine = make_engine(slots=1)
    engine.submit(lease(0, prompt=[1, 2, 3]))
    engine.submit(lease(1))
    assert [(one.tokens, one.queued) for one in engine.progress()] == [(0, True), (0, True)]
    engine.poll()
    engine.poll()
    assert [(one.tokens, one.queued) for one in engine.progress()] == [(5, False), (0, True)]
    engine.apply(1, tensors_of(tiny_model()))
    engine.poll()
    # Recomputing the cache is work: the prompt and the first of two tokens, the second is decoded next.
    assert [one.tokens for one in engine.progress()] == [9, 0]
    assert (engine.tokens_sampled, engine.steps_sampled) == (2, 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lease(0, prompt=[1] * 61, new=20), "exceed max_model_tokens 80"),
        (lease(0, prompt=[]), "at least one prompt token"),
        (lease(0, prompt=[1, VOCAB]), "outside the vocabulary"),
        (lease(0, prompt=[1, -1]), "outside the vocabulary"),
        (lease(0, new=0), "one new"),
    ],
)
def test_a_lease_that_can_never_run_is_refused(bad: object, reason: str) -> None:
    engine = make_engine()
    with pytest.raises(LeaseError, match=reason) as caught:
        engine.submit(bad)  # type: ignore[arg-type]
    assert caught.value.lease.rollout == 0 and engine.idle
    assert len(finish(engine, [lease(1, prompt=[1] * 60, new=20)])[1].response) == 20


@pytest.mark.parametrize("fused", [True, False])
def test_logits_that_are_not_finite_fail_their_lease_only(fused: bool) -> None:
    model = tiny_model("llama")
    if not fused:  # a hook is a reason to run the model's own code
        model.model.norm.register_forward_hook(lambda *_: None)
    healthy = [lease(n, prompt=[1, 2, n], new=2) for n in (0, 1, 2, 3)]
    expected = finish(make_engine(model, slots=3), healthy)
    engine = make_engine(model, slots=3)
    with torch.no_grad():  # such a token comes from nowhere: weights that are not finite are refused
        engine._model.model.model.embed_tokens.weight[5] = torch.inf
    engine._model._fused = engine._model._fuse()
    assert (engine._model._fused is not None) == fused
    engine.submit(lease(7, prompt=[1, 5]))
    engine.submit(lease(8, prompt=[5, 5]))
    for one in healthy:
        engine.submit(one)
    failed, samples = [], {}
    while not engine.idle:
        try:
            samples |= {sample.lease.rollout: sample for sample in engine.poll()}
        except LeaseError as error:
            failed.append(error.lease.rollout)
            assert "rollout 7" in str(error) or "rollout 8" in str(error)
            assert "not finite at response token 0 (version 0)" in error.reason
    assert failed == [7, 8]
    # The slots of the failed rows are used again: nothing of them may be left there.
    assert_same({n: samples[n] for n in expected if 5 not in samples[n].response}, expected)


def test_apply_takes_tied_names_and_reports_the_digest_of_what_is_served() -> None:
    engine = make_engine()
    tensors = tensors_of(perturbed(tiny_model(), 5, 0.1))
    digest = state_digest(tensors)
    assert engine.apply(1, tensors) == digest
    assert engine.apply(2, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}) == digest
    renamed = {{"model.embed_tokens.weight": "lm_head.weight"}.get(name, name): one for name, one in tensors.items()}
    assert engine.apply(3, renamed) == digest
    assert engine.version == 3


def test_apply_is_all_or_nothing() -> None:
    engine = make_engine()
    good = tensors_of(perturbed(tiny_model(), 5, 0.1))
    name, norm = "model.embed_tokens.weight", "model.norm.weight"
    bad = {
        "1 of 26 tensors are missing, first 'model.norm.weight'": {n: t for n, t in good.items() if n != norm},
        "unexpected tensor 'extra'": good | {"extra": torch.zeros(1)},
        r"'model.norm.weight': expected shape \(32,\), found \(33,\)": good | {norm: torch.zeros(33)},
        "'model.norm.weight' .* not finite": good | {norm: good[norm] * math.nan},
        "'model.norm.weight': expected torch.float32, found torch.int32": good | {norm: torch.ones(32).int()},
        "'lm_head.weight' differs": good | {"lm_head.weight": good[name] + 1},
    }
    for message, tensors in bad.items():
        with pytest.raises(EngineError, match=message):
            engine.apply(1, tensors)
    assert engine.version == 0
    assert_same(finish(engine, [lease(0)]), finish(make_engine(), [lease(0)]))


def test_buffers_of_the_models_files_travel_and_others_do_not() -> None:
    engine, learner = make_engine(), tiny_model()
    for one in (engine._model.model, learner):
        one.model.register_buffer("scale", torch.ones(3))
        one.model.register_buffer("steps", torch.tensor([7]))
    learner.model.scale.mul_(2)
    assert {t.dtype for t in dict(full_state(learner, torch.bfloat16)).values()} == {torch.bfloat16, torch.int64}
    tensors = dict(full_state(learner, torch.float32))
    assert {"model.scale", "model.steps"} == tensors.keys() - tensors_of(tiny_model()).keys()
    assert not [name for name in tensors if "inv_freq" in name]
    assert engine.apply(1, tensors) == state_digest(tensors)
    assert engine._model.model.model.scale.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(EngineError, match=r"1 of 28 tensors are missing, first 'model\.scale'"):
        engine.apply(2, {name: tensor for name, tensor in tensors.items() if name != "model.scale"})
    assert engine.version == 1


def test_an_engine_that_does_not_hold_what_it_was_given_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    victim = dict(engine._model.model.named_parameters())["model.norm.weight"]
    copy = torch.Tensor.copy_

    def faulty(self: torch.Tensor, *args: object) -> torch.Tensor:
        result = copy(self, *args)  # type: ignore[arg-type]
        if self is victim:
            self.view(torch.int32)[5] ^= 1 << 20
        return result

    monkeypatch.setattr(torch.Tensor, "copy_", faulty)
    with pytest.raises(EngineError, match=r"tensor 'model\.norm\.weight': expected to serve checksum"):
        engine.apply(1, tensors_of(perturbed(tiny_model(), 5, 0.1)))
    assert engine.version == 0  # half an update is never called a version


def test_versions_grow_while_sequences_run() -> None:
    engine = make_engine(version=4)
    engine.submit(lease(0))
    engine.poll()
    with pytest.raises(EngineError, match="above 4 while sequences run, found 4"):
        engine.apply(4, tensors_of(tiny_model()))
    finish(engine)
    # A learner that resumed from a checkpoint begins below.
    engine.apply(2, tensors_of(tiny_model()))
    assert engine.version == 2


def test_the_learner_decides_the_dtype() -> None:
    engine = make_engine(keep_kv=True)
    engine.submit(lease(0))
    engine.poll()
    double = {name: tensor.double() for name, tensor in tensors_of(tiny_model()).items()}
    assert engine.apply(1, double) == state_digest(double)
    sample = finish(engine)[0]
    np.testing.assert_allclose(sample.logprobs, plain_logprobs(tiny_model(), sample), atol=1e-6, rtol=0)


def test_a_model_of_another_kind_is_refused_at_the_start() -> None:
    with pytest.raises(ModelError, match="positions end at 128"):
        make_engine(max_model_tokens=129)
    chunked = tiny_model()
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelError, match="found chunked_attention"):
        make_engine(chunked)

    class Scaled(torch.nn.Module):
        """A model whose decoding differs from its plain forward."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x)
            return out * (1.0 if x.shape[1] > 8 else 1.01)

    odd = tiny_model("llama")
    odd.model.norm = Scaled(odd.model.norm)
    with pytest.raises(ModelError, match="computes other logits over the slot cache"):
        make_engine(odd)


def test_a_cache_larger_than_the_machine_is_refused() -> None:
    cache = KVCache(slots=1 << 20, max_tokens=1 << 20, num_layers=2)
    with pytest.raises(ConfigError, match=r"GiB.*lower --slots"):
        cache.layer(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_slot_is_copied_whatever_its_dtype(dtype: torch.dtype) -> None:
    cache = KVCache(slots=3, max_tokens=32, num_layers=1)
    with torch.inference_mode():
        key, value = cache.layer(0, *torch.zeros(2, 1, 2, 1, 8, dtype=dtype).unbind())
        key[2], value[2] = torch.randn(2, 32, 8).to(dtype), torch.randn(2, 32, 8).to(dtype)
    cache.move(2, 0, 5)
    for one in (key, value):
        assert torch.equal(one[0, :, :5], one[2, :, :5])
        assert not one[0, :, 5:].any()
        assert not one[1].any()
    cache.clear(2)
    assert not key[2].any()


def test_close_forgets_everything() -> None:
    engine: TransformersEngine = make_engine()
    engine.submit(lease(0))
    engine.poll()
    engine.submit(lease(1, new=MAX_TOKENS - 20))
    engine.close()
    engine.close()
    assert engine.idle and engine.progress() == []
