"""Weights from the learner to generators over loopback TCP: bytes on the wire, seconds, and who is held up how long.

Two models are published after real AdamW steps on random text: the demo's (fp32, LR 2e-4: every word changes) and one
of Qwen2.5-0.5B's shape with 2 of its 24 layers (bf16 copies of fp32 weights, LR 1e-6: few words change). All processes
share this machine's cores, so times are an upper bound of what separate machines need beside the network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.protocol import Row, row
from orz_async.observe.events import EventLog
from orz_async.weights.delta import apply_block, encode_block
from orz_async.weights.payload import SEGMENT_BYTES, segments
from orz_async.weights.protocol import Fetcher, Snapshot
from orz_async.weights.relay import Relay
from orz_async.weights.snapshot import State, capture, tensor_bytes
from orz_async.weights.stream import StreamFetcher, StreamPublisher

LOOPBACK = "tcp://127.0.0.1:0"
WARMUP_STEPS = 3  # Adam's first steps move every weight by the full learning rate; later ones are what a run sees
VERSIONS = 5
LAG = 4
READERS = 8
Version = dict[str, Tensor]


def demo_model() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]


def half_billion_shape(layers: int = 2) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]


def updates(model: Qwen2ForCausalLM, lr: float, dtype: torch.dtype, tokens: int) -> Iterator[Version]:
    """The weights after each of VERSIONS consecutive optimizer steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    random = torch.Generator().manual_seed(0)
    for step in range(WARMUP_STEPS + VERSIONS):
        text = torch.randint(0, model.config.vocab_size, (4, tokens // 4), generator=random)
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARMUP_STEPS:
            yield {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}


def arrive(fetcher: Fetcher, version: int) -> Snapshot:
    fetcher.want(version)
    end = time.monotonic() + 120
    while (snapshot := fetcher.poll()) is None:
        if time.monotonic() > end:
            raise TimeoutError(fetcher.waiting_for())
        time.sleep(0.0005)
    return snapshot


def travel(model: str, versions: list[Version]) -> list[Row]:
    """Publish in turn; one fetcher follows, one joins each time, one comes back after LAG versions."""
    name, full = f"weights {model}", sum(tensor.nbytes for tensor in versions[0].values())
    held, joins, follows, bytes_sent, forms = [], [], [], [], []
    with ExitStack() as stack:
        events = EventLog.disabled()
        publisher = stack.enter_context(closing(StreamPublisher(LOOPBACK, 0, events)))
        steady, lagging = (
            stack.enter_context(closing(StreamFetcher(publisher.address, 0, events, stall_s=60))) for _ in range(2)
        )
        for number, version in enumerate(versions):
            report = publisher.publish(number, version.items())
            held.append(report.seconds * 1e3)
            started = time.monotonic()
            snapshot = arrive(steady, number)
            if number:
                follows.append((time.monotonic() - started) * 1e3)
                bytes_sent.append(100 * snapshot.bytes / full)
                forms.append("delta" if snapshot.base_version >= 0 else "full")
            else:
                arrive(lagging, 0)
            with closing(StreamFetcher(publisher.address, 0, events, stall_s=60)) as late:
                started = time.monotonic()
                arrive(late, number)
                joins.append((time.monotonic() - started) * 1e3)
        started = time.monotonic()
        merged = arrive(lagging, LAG)
        merged_ms = (time.monotonic() - started) * 1e3
    return [
        row(name, "publish(): caller held up", "ms", held, megabytes=full / 1e6),
        row(name, "join: snapshot to verified", "ms", joins),
        row(name, "follow: published to verified", "ms", follows, form=forms[-1]),
        row(name, "follow: bytes / full", "%", bytes_sent),
        row(name, f"{LAG} behind: asked to verified", "ms", [merged_ms], base=merged.base_version),
        row(name, f"{LAG} behind: bytes / full", "%", [100 * merged.bytes / full]),
    ]


def coding(old: State, new: State) -> list[Row]:
    """Speed of one core, in bytes of tensor a second."""
    encode_s = decode_s = 0.0
    total = 0
    for spec in new.specs:
        pairs = zip(
            segments(tensor_bytes(new.tensors[spec.name]), SEGMENT_BYTES),
            segments(tensor_bytes(old.tensors[spec.name]), SEGMENT_BYTES),
            strict=True,
        )
        for after, before in pairs:
            started = time.perf_counter()
            block, piece = encode_block(after, before, spec.dtype)
            encoded = time.perf_counter()
            target = memoryview(bytearray(before))
            copied = time.perf_counter()
            apply_block(target, spec.dtype, block, piece)
            decode_s += time.perf_counter() - copied
            encode_s += encoded - started
            total += len(after)
    return [
        row("weights coding, one core", "encode", "GB/s", [total / encode_s / 1e9]),
        row("weights coding, one core", "apply", "GB/s", [total / decode_s / 1e9]),
    ]


def fan_out(versions: list[Version]) -> list[Row]:
    """Bytes the learner sends for one update to READERS generators, as a multiple of what one costs it."""
    multiples: dict[str, list[float]] = {"directly": [], "through one relay": []}
    seconds: dict[str, list[float]] = {variant: [] for variant in multiples}
    for variant in multiples:
        with ExitStack() as stack:
            events = EventLog.disabled()
            publisher = stack.enter_context(closing(StreamPublisher(LOOPBACK, 0, events)))
            source, readers = publisher.address, READERS
            if variant != "directly":
                relay = stack.enter_context(closing(Relay(source, LOOPBACK, 0, events, stall_s=60)))
                source, readers = relay.address, READERS - 1  # the relay's own engine is the eighth
            fetchers = [
                stack.enter_context(closing(StreamFetcher(source, 0, events, stall_s=60))) for _ in range(readers)
            ]
            for number, version in enumerate(versions[:3]):
                before = publisher.traffic.bytes_sent
                publisher.publish(number, version.items())
                started = time.monotonic()
                for fetcher in fetchers:
                    fetcher.want(number)
                one = max(arrive(fetcher, number).bytes for fetcher in fetchers)
                seconds[variant].append((time.monotonic() - started) * 1e3)
                multiples[variant].append((publisher.traffic.bytes_sent - before) / one)
    name = f"weights to {READERS} generators"
    return [row(name, f"{variant}: bytes / one", "x", values) for variant, values in multiples.items()] + [
        row(name, f"{variant}: all verified", "ms", values) for variant, values in seconds.items()
    ]


def run() -> list[Row]:
    torch.manual_seed(0)
    small = list(updates(demo_model(), 2e-4, torch.float32, tokens=512))
    rows = travel("demo fp32", small)
    large = list(updates(half_billion_shape(), 1e-6, torch.bfloat16, tokens=32))
    rows += travel("0.5B shape bf16", large)
    rows += coding(capture(0, large[-2].items()), capture(1, large[-1].items()))
    return rows + fan_out(large)
