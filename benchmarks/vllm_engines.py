"""vLLM against the embedded engine, and sampling while weights travel. Run by an interpreter that has vLLM:

    .venv-vllm/bin/python -m benchmarks.vllm_engines            or: .venv-vllm/bin/python -m benchmarks.run vllm

Both engines sample the demo's work on the demo's model shape, in turns; see `benchmarks.engines`. For the weights a
model of 8.5 M parameters is used, so that they take a while: windows of sampling alone, of sampling while versions
travel without a break, or one every two seconds, and of sampling while the latter are also served, in turns. The
learner's part, copying and coding each version, is done on the same cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import engines
from benchmarks.protocol import Row, cpu_name, row, save, table
from orz_async.generator.stop import StopMatcher
from orz_async.generator.vllm_engine import VllmEngine
from orz_async.generator.vllm_loop import VllmLoop
from orz_async.generator.vllm_shim import make_engine_args, prepare_environment, require_vllm
from orz_async.records import Lease, Sampling, int32_bytes

CONCURRENT = (8, 32, 128)
TURNS = 2
WINDOWS, WINDOW_S = 4, 3.0


def start(model: Any, directory: str, *, slots: int, max_tokens: int) -> VllmLoop:
    model.save_pretrained(directory)
    return VllmLoop(
        make_engine_args(
            model=directory,
            dtype="float32",
            slots=slots,
            max_model_tokens=max_tokens,
            prefill_tokens=8192,
            tensor_parallel=1,
            data_parallel=1,
            options={},
        )
    )


def engine_of(vllm: VllmLoop, model: Any, *, slots: int, max_tokens: int) -> VllmEngine:
    stop = StopMatcher(("</answer>",), lambda tokens: "".join(chr(60 + token) for token in tokens), engines.VOCAB)
    engine = VllmEngine(
        vllm,
        model=model,
        dtype="float32",
        slots=slots,
        max_model_tokens=max_tokens,
        stop=stop,
        eos_tokens=(),
        vocab_size=engines.VOCAB,
    )
    engine.apply(0, dict(model.named_parameters()))
    return engine


def sampler(engine: VllmEngine) -> Callable[[], int]:
    prompts, limits = engines.workload()

    def sample() -> int:
        for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            engine.submit(Lease("train", n, 0, "", int32_bytes(prompt), "", 0, n, 0, Sampling(1.0, limit)))
        tokens = 0
        while not engine.idle:
            tokens += sum(len(done.response) for done in engine.poll())
        return tokens

    return sample


def speed() -> list[Row]:
    """Tokens per second of both engines with 8, 32 and 128 rollouts at once, in turns."""
    longest = engines.PROMPT + engines.LONGEST
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        model = engines.demo_shape()
        vllm = start(model, directory, slots=max(CONCURRENT), max_tokens=longest)
        for concurrent in CONCURRENT:
            variants = {
                "embedded": engines.embedded(concurrent),
                "vLLM": sampler(engine_of(vllm, model, slots=concurrent, max_tokens=longest)),
            }
            rates: dict[str, list[float]] = {name: [] for name in variants}
            for turn in range(TURNS + 1):
                for name, sample in variants.items():
                    began = time.perf_counter()
                    tokens = sample()
                    if turn:  # the first is a warm-up
                        rates[name].append(tokens / (time.perf_counter() - began))
            ratio = median(a / b for a, b in zip(rates["vLLM"], rates["embedded"], strict=True))
            for name, values in rates.items():
                one = row("vLLM and embedded, demo shape", f"{name}, {concurrent} at once", "tok/s", values)
                rows.append(one | {"ratio_to_first": ratio if name == "vLLM" else 1.0})
        vllm.close()
    return rows


def middle_model() -> Any:
    config = Qwen2Config(
        vocab_size=engines.VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


class Traffic:
    """A learner that publishes a changed version when the last one has arrived and the period is over."""

    def __init__(self, model: Any) -> None:
        from orz_async.observe.events import EventLog
        from orz_async.weights.stream import StreamFetcher, StreamPublisher

        self.model, self.version = model, 0
        self.publisher = StreamPublisher("tcp://127.0.0.1:0", 1, EventLog.disabled())
        self.fetcher = StreamFetcher(self.publisher.address, 1, EventLog.disabled())
        self.fetched: list[float] = []
        self.period_s = 0.0
        self._due = 0.0

    def step(self) -> Any:
        """Ask for the next version when the last has come; the snapshot, when one has."""
        if self.version == len(self.fetched) and time.perf_counter() >= self._due:
            self.version, self._due = self.version + 1, time.perf_counter() + self.period_s
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.0001)
            self.publisher.publish(self.version, self.model.named_parameters())
            self.fetcher.want(self.version)
        snapshot = self.fetcher.poll()
        if snapshot is not None:
            self.fetched.append(snapshot.fetch_s)
        return snapshot

    def close(self) -> None:
        self.fetcher.close()
        self.publisher.close()


def window(engine: VllmEngine, traffic: Traffic | None, *, serve: bool) -> float:
    """Tokens per second while at least 32 rollouts are queued or running all the time."""
    before, began, number = engine.tokens_sampled, time.perf_counter(), 0
    while time.perf_counter() - began < WINDOW_S:
        while len(engine.progress()) < 48:
            number += 1
            prompt = int32_bytes([1 + number % 40] * engines.PROMPT)
            engine.submit(Lease("train", number, 0, "", prompt, "", 0, number, 0, Sampling(1.0, 80)))
        engine.poll()
        snapshot = None if traffic is None else traffic.step()
        if snapshot is not None and serve:
            engine.apply(snapshot.version, snapshot.tensors)
    rate = (engine.tokens_sampled - before) / (time.perf_counter() - began)
    for one in engine.progress():
        engine.cancel(one.lease)
    while not engine.idle:
        engine.poll()
    return rate


def travel() -> list[Row]:
    """Tokens per second alone, while versions travel, and while they are served too; the parts of an update."""
    alone, always, paced, served = "alone", "versions travel all the time", "one every 2 s", "one every 2 s, served"
    rates: dict[str, list[float]] = {alone: [], always: [], paced: [], served: []}
    parts: dict[str, list[float]] = {"transfer_s": [], "pause_s": [], "drain_s": [], "load_s": []}
    with tempfile.TemporaryDirectory() as directory:
        model = middle_model()
        vllm = start(model, directory, slots=32, max_tokens=128)
        engine = engine_of(vllm, model, slots=32, max_tokens=128)
        apply = engine.apply

        def noted(version: int, tensors: Any) -> str:
            digest = apply(version, tensors)
            for name, values in parts.items():
                values.append(engine.timings[name])
            return digest

        engine.apply = noted  # type: ignore[method-assign]
        traffic = Traffic(model)
        window(engine, traffic, serve=True)  # warm-up
        fetches = len(traffic.fetched)
        for _ in range(WINDOWS):
            rates[alone].append(window(engine, None, serve=False))
            traffic.period_s = 0.0
            rates[always].append(window(engine, traffic, serve=False))
            traffic.period_s = 2.0
            rates[paced].append(window(engine, traffic, serve=False))
            rates[served].append(window(engine, traffic, serve=True))
        fetches = len(traffic.fetched) - fetches
        size = sum(one.numel() * one.element_size() for one in model.parameters())
        traffic.close()
        vllm.close()
    rows = [
        row("sampling while weights travel", name, "tok/s", values, fetches=fetches, bytes_of_a_version=size)
        | {"ratio_to_first": median(value / one for value, one in zip(values, rates[alone], strict=True))}
        for name, values in rates.items()
    ]
    return rows + [row("one update of vLLM", name, "s", values) for name, values in parts.items()]


PARTS = {"speed": speed, "travel": travel}


def run(parts: Iterable[str] = tuple(PARTS)) -> list[Row]:
    """ConfigError where this interpreter has no vLLM."""
    require_vllm()
    prepare_environment(threads=1, kv_gb=1.0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for part in parts:
        print(f"-- {part}", flush=True)
        rows += PARTS[part]()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_engines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = run([options.only] if options.only else PARTS)
    print(table(rows), flush=True)
    print(save("vllm", rows, device=cpu_name(), out=options.out, module="benchmarks.vllm_engines"))


if __name__ == "__main__":
    main()
