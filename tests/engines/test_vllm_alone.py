"""What only vLLM can get wrong: updates that arrive damaged, memory for keys and values, and processes that die.

The last two tests leave the engine unusable, so they come last and each says so.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest
import torch

from orz_async.errors import EngineError
from orz_async.generator import vllm_shim as shim
from orz_async.generator.engine import Engine, LeaseError, ref_of
from orz_async.records import Span
from tests.engines.kit import PATIENCE_S, lease, run, run_until, tensors, vllm_maker


def children() -> list[psutil.Process]:
    return [
        one for one in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(one.cmdline())
    ]


def assert_silent(engine: Engine) -> None:
    """Nothing may be sampled: what is loaded is half of each version, or not what was sent."""
    engine.poll()  # what was sampled before the pause
    before = engine.tokens_sampled
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert not engine.poll()
    assert engine.tokens_sampled == before


def test_an_update_says_what_it_cost(vllm: Any) -> None:
    engine = vllm_maker(vllm)()
    assert set(engine.timings) == {"transfer_s", "pause_s", "drain_s", "load_s"}
    assert 0 < engine.timings["drain_s"] + engine.timings["load_s"] <= engine.timings["pause_s"]


def test_no_more_run_than_fit_into_the_memory_for_keys(vllm: Any) -> None:
    engine = vllm_maker(vllm)()
    engine._kv_tokens = 80  # three prompts of 8 tokens, a block of 16 for each, and a sixteenth of all to spare
    for n in range(6):
        engine.submit(lease(n, prompt=[n] * 8, new=40))
    run_until(engine, 1)
    running = [one for one in engine.progress() if not one.queued]
    assert len(running) == 3
    assert len(run(engine)) == 6


def test_samples_of_one_prompt_share_its_blocks(vllm: Any) -> None:
    """A prompt of several blocks is computed once for all its samples: vLLM says so of each request."""
    engine, prompt = vllm_maker(vllm)(), [n % 40 for n in range(140)]

    async def cached(salt: str) -> int:
        params = shim.make_sampling(temperature=1.0, seed=1, max_tokens=1, stop_tokens=[])
        async for output in vllm.llm.generate(shim.make_prompt(prompt, salt), params, f"cached-{salt}-{time.time()}"):
            found = output.num_cached_tokens
        return int(found or 0)

    run(engine, [lease(n, prompt=prompt, new=4) for n in range(3)])
    assert vllm.call(cached(engine._salt()), 60, "a request") >= 128 // 2
    assert vllm.call(cached("another"), 60, "a request") == 0
    old = engine._salt()
    engine.apply(1, tensors(1))
    assert vllm.call(cached(old), 60, "a request") == 0, "the update must have cleared the prefixes"


def test_a_dtype_that_the_engine_does_not_serve_is_refused(vllm: Any) -> None:
    engine = vllm_maker(vllm)()
    given = {name: one.to(torch.bfloat16) for name, one in tensors(1).items()}
    with pytest.raises(EngineError, match=r"expected the engine's float32, found torch.bfloat16; .*--dtype bfloat16"):
        engine.apply(1, given)
    assert engine.version == 0


def test_a_request_that_vllm_ends_by_itself_fails_its_lease_with_what_it_had(vllm: Any) -> None:
    engine = vllm_maker(vllm)()
    engine.submit(lease(1, new=150))
    engine.submit(lease(2, new=30))
    run_until(engine, 10)
    name = next(name for name, one in engine._running.items() if one.lease.rollout == 1)
    vllm.abort(name)  # nobody here asked for it
    with pytest.raises(LeaseError, match=r"vLLM ended it as 'abort' after \d+ tokens") as caught:
        run(engine)
    assert caught.value.lease.rollout == 1
    assert run(engine)[2].spans == (Span(0, 0),)


def test_what_is_served_is_read_again_and_a_difference_names_the_tensor(vllm: Any) -> None:
    engine = vllm_maker(vllm)()
    # Of 2 layers, on a CPU that packs linear layers: the embedding, and the norms (3) and biases of them.
    assert 1 + 5 <= engine.read_back <= len(tensors())
    told = engine._weight_file.served

    def served() -> list[dict[str, int]]:
        [worker] = told()
        return [worker | {"model.layers.0.input_layernorm.weight": 1}]

    engine._weight_file.served = served  # type: ignore[method-assign]
    engine.submit(lease(0, new=150))
    run_until(engine, 5)
    with pytest.raises(
        EngineError, match=r"tensor 'model.layers.0.input_layernorm.weight' of version 1: .* serves 000"
    ):
        engine.apply(1, tensors(1))
    assert engine.version == 0
    assert_silent(engine)
    engine._weight_file.served = told  # type: ignore[method-assign]
    engine.apply(2, tensors(2))  # the whole update again
    assert [span.version for span in run(engine)[0].spans] == [0, 2]


def test_a_vllm_that_does_not_answer_holds_up_one_cancellation(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = vllm_maker(vllm)()
    for n in range(4):
        engine.submit(lease(n, new=150))
    run_until(engine, 8)
    asked: list[str] = []
    monkeypatch.setattr(vllm, "end", lambda name, _seconds: bool(asked.append(name)))  # it appends, and is False
    monkeypatch.setattr(vllm, "abort", lambda _name: None)  # nor does it hear that, which would bring the last chunk
    names = [name for name, one in engine._running.items() if one.lease.rollout < 3]
    partials = [engine.cancel(ref_of(lease(n))) for n in range(3)]
    assert len(asked) == 1 and engine.idle is False
    for partial in partials:  # what had come until then, without the versions that only the last chunk has
        assert partial is not None and len(partial.response) and partial.spans == ()
    monkeypatch.undo()
    assert all(vllm.end(name, PATIENCE_S) for name in names)  # nothing of this test runs on into the next one
    run_until(engine, 8)  # chunks again: it answers
    last = engine.cancel(ref_of(lease(3)))
    assert last is not None and last.spans == (Span(0, 0),)
    assert engine.idle and len(run(engine, [lease(5, new=4)])[5].response) == 4


def test_a_damaged_update_names_the_tensor_and_is_never_served(vllm: Any) -> None:
    """Leaves the engine paused in the middle of an update."""
    engine = vllm_maker(vllm)()
    write = engine._weight_file.write

    def damaged(given: Any) -> Any:
        update, digest = write(given)
        update["checksums"]["model.layers.1.mlp.up_proj.weight"] ^= 1
        return update, digest

    engine._weight_file.write = damaged  # type: ignore[method-assign]
    engine.submit(lease(0, new=150))
    run_until(engine, 5)
    with pytest.raises(EngineError, match=r"tensor 'model.layers.1.mlp.up_proj.weight': expected checksum"):
        engine.apply(1, tensors(1))
    assert_silent(engine)
    assert engine.version == 0


def test_a_killed_engine_is_an_engine_error_within_seconds(vllm: Any) -> None:
    """Leaves no engine."""
    processes = children()
    assert processes
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"vLLM died|vLLM failed") as caught:
        vllm_maker(vllm)()
    assert caught.value.exit_code == 11
    assert time.monotonic() - began < PATIENCE_S
    assert vllm.dead
