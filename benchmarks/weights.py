"""Weights from the learner to generators over loopback TCP: bytes on the wire, seconds, and who is held up how long.

Two models. The demo's, in float32: consecutive versions of a short real run of the recipe (PPO, LR 2e-4), where every
word changes. One of Qwen2.5-0.5B's shape, all 24 layers or as many as asked for, with random weights: bf16 copies of
float32 weights after real AdamW steps at LR 1e-6 on random text, where few words change; layers and embedding are also
coded apart. All processes share this machine's cores, so times are an upper bound of what separate machines need beside
the network.

Memory, for P parameters (0.49 G with all layers): 16 P bytes while the optimizer steps; then, without it, 2 P for each
copy in bf16, of which publisher and three fetchers hold up to ten at once. The versions themselves lie in files, whose
pages count as resident while there is room. With one layer, 0.3 GB a version, 4.3 GiB were resident at most; by that
count all layers, 1.0 GB a version, need 14 GiB, 5 of them pages of files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.cutter import Cutter
from benchmarks.protocol import Row, row
from orz_async.broker.relays import routes
from orz_async.learner.base import make_base
from orz_async.observe.events import EventLog
from orz_async.weights.delta import apply_block, encode_block
from orz_async.weights.file import FileFetcher
from orz_async.weights.history import worth_coding
from orz_async.weights.payload import SEGMENT_BYTES, segments
from orz_async.weights.protocol import Fetcher, Snapshot
from orz_async.weights.relay import Relay
from orz_async.weights.snapshot import State, capture, tensor_bytes
from orz_async.weights.stream import StreamFetcher, StreamPublisher
from orz_async.weights.transport import relay_address

LOOPBACK = "tcp://127.0.0.1:0"
WARMUP_STEPS = 3  # Adam's first steps move every weight by the full learning rate; later ones are what a run sees
VERSIONS = 5
LAG = 4
READERS = 8
ALL_LAYERS = 24
FAN_OUT_LAYERS = 4
"""Of the model that READERS generators in this one process hold, without its embedding."""
PATIENCE_S = 300
Version = dict[str, Tensor]


def demo_updates() -> list[Version]:
    """Consecutive versions of a run of the demo's recipe from a base model that is hardly trained."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_base(base, seed=1, steps=60, threads=1)
        options = {
            "--run-dir": f"{folder}/run",
            "--model.path": base / "model",
            "--data.train": base / "train.jsonl",
            "--data.heldout": base / "heldout.jsonl",
            "--weights.transport": "file",
            "--weights.directory": f"{folder}/weights",
            "--steps": VERSIONS + 1,
            "--eval.every": 0,
        }
        command = [sys.executable, "-m", "orz_async.cli", "run", "tiny_cpu"]
        command += [str(word) for option in options.items() for word in option]
        with Path(folder, "log").open("wb") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            try:
                with closing(FileFetcher(f"file://{folder}/weights", 1, EventLog.disabled())) as fetcher:
                    # Version 0 is the base itself; the first update moves every weight by the full learning rate.
                    return [arrive(fetcher, version).tensors for version in range(1, VERSIONS + 1)]
            finally:
                run.terminate()
                run.wait()


def half_billion_shape(layers: int) -> Qwen2ForCausalLM:
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


class Stored(Sequence[Version]):
    """Versions as files, each read when it is asked for and given back by the machine when memory is short."""

    def __init__(self, folder: Path, versions: Iterable[Version]) -> None:
        self._files: list[Path] = []
        for number, version in enumerate(versions):
            self._files.append(folder / f"{number}.safetensors")
            save_file(version, self._files[-1])

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Version: ...
    @overload
    def __getitem__(self, index: slice) -> list[Version]: ...
    def __getitem__(self, index: int | slice) -> Version | list[Version]:
        files = self._files[index]
        return [load_file(one) for one in files] if isinstance(files, list) else load_file(files)


def arrive(fetcher: Fetcher, version: int) -> Snapshot:
    fetcher.want(version)
    end = time.monotonic() + PATIENCE_S
    while (snapshot := fetcher.poll()) is None:
        if time.monotonic() > end:
            raise TimeoutError(fetcher.waiting_for())
        time.sleep(0.0005)
    return snapshot


def exact(snapshot: Snapshot, expected: Version) -> int:
    """Tensors that arrived, every one of them bit by bit what was published; an error otherwise."""
    if snapshot.tensors.keys() != expected.keys():
        raise AssertionError(f"expected {sorted(expected)}, got {sorted(snapshot.tensors)}")
    for name, tensor in expected.items():
        found = snapshot.tensors[name]
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape) or tensor_bytes(found) != tensor_bytes(tensor):
            raise AssertionError(f"tensor {name!r} of version {snapshot.version} is not what was published")
    return len(expected)


def travel(model: str, versions: Sequence[Version]) -> list[Row]:
    """Publish in turn; one fetcher follows, one joins each time, one comes back after LAG versions."""
    name, full = f"weights {model}", sum(tensor.nbytes for tensor in versions[0].values())
    held, joins, follows, bytes_sent, forms, tensors = [], [], [], [], [], 0
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
            seconds = time.monotonic() - started
            tensors += exact(snapshot, version)
            if number:
                follows.append(seconds * 1e3)
                bytes_sent.append(100 * snapshot.bytes / full)
                forms.append("delta" if snapshot.base_version >= 0 else "full")
            else:
                arrive(lagging, 0)
            with closing(StreamFetcher(publisher.address, 0, events, stall_s=60)) as late:
                started = time.monotonic()
                joined = arrive(late, number)
                joins.append((time.monotonic() - started) * 1e3)
                tensors += exact(joined, version)
        started = time.monotonic()
        merged = arrive(lagging, LAG)
        merged_ms = (time.monotonic() - started) * 1e3
        tensors += exact(merged, versions[-1])
    return [
        row(name, "publish(): caller held up", "ms", held, megabytes=full / 1e6),
        row(name, "join: snapshot to verified", "ms", joins),
        row(name, "follow: published to verified", "ms", follows, form=forms[-1]),
        row(name, "follow: bytes / full", "%", bytes_sent),
        row(name, f"{LAG} behind: asked to verified", "ms", [merged_ms], base=merged.base_version),
        row(name, f"{LAG} behind: bytes / full", "%", [100 * merged.bytes / full]),
        row(name, "arrived bit for bit", "tensors", [tensors], wrong=0),
    ]


def coding(model: str, old: State, new: State) -> list[Row]:
    """Speed of one core, in bytes of tensor a second; and what is sent, for layers and embedding apart."""
    encode_s = decode_s = 0.0
    total, coded = {"layers": 0, "rest": 0}, {"layers": 0, "rest": 0}
    for spec in new.specs:
        part = "layers" if ".layers." in spec.name else "rest"
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
            total[part] += len(after)
            coded[part] += block.bytes
            if target != after:
                raise AssertionError(f"tensor {spec.name!r} is not what was coded")
    name, num_bytes = f"weights coding {model}", sum(total.values())
    started = time.perf_counter()
    worth = worth_coding(new, old)
    probed_ms = (time.perf_counter() - started) * 1e3
    return [
        row(name, "encode, one core", "GB/s", [num_bytes / encode_s / 1e9]),
        row(name, "apply, one core", "GB/s", [num_bytes / decode_s / 1e9]),
        row(name, "coded bytes / full", "%", [100 * sum(coded.values()) / num_bytes]),
        *(row(name, f"coded bytes / full: {part}", "%", [100 * coded[part] / total[part]]) for part in total),
        row(name, "probe: is a delta worth coding", "ms", [probed_ms], worth=worth),
    ]


def scaled(rows: list[Row], version: Version, measured: int) -> Row:
    """What the model, measured with so many layers, would send with all: layers and the rest weighed by their sizes."""
    percent = {r["variant"].rpartition(" ")[2]: r["median"] for r in rows if "full:" in r["variant"]}
    layers = sum(t.nbytes for name, t in version.items() if ".layers." in name) * ALL_LAYERS / measured
    rest = sum(t.nbytes for name, t in version.items() if ".layers." not in name)
    value = (percent["layers"] * layers + percent["rest"] * rest) / (layers + rest)
    return row(rows[0]["name"], f"scaled to {ALL_LAYERS} layers", "%", [value], full_megabytes=(layers + rest) / 1e6)


def resume(version: Version) -> list[Row]:
    """The connection is cut in the middle of a snapshot; what arrived before is not sent again."""
    full = sum(tensor.nbytes for tensor in version.values())
    with ExitStack() as stack:
        events = EventLog.disabled()
        publisher = stack.enter_context(closing(StreamPublisher(LOOPBACK, 0, events)))
        publisher.publish(0, version.items())
        cutter = stack.enter_context(closing(Cutter(publisher.address, after=full // 2)))
        fetcher = stack.enter_context(closing(StreamFetcher(cutter.address, 0, events)))
        snapshot = arrive(fetcher, 0)
        exact(snapshot, version)
        if cutter.connections != 2:
            raise AssertionError(f"expected one cut and one new connection, saw {cutter.connections} connections")
        return [row("weights resume after a cut", "received / full", "x", [fetcher.received_bytes / full], cut_at=0.5)]


def fan_out(versions: list[Version]) -> list[Row]:
    """Bytes the learner sends to READERS generators, as a multiple of what one costs it: a first snapshot, then deltas.

    The relays are those that `orz run --weights.relays true` makes: every generator is one, in the broker's tree.
    """
    name, rows = f"weights to {READERS} generators", []
    for variant in ("directly", "through relays"):
        multiples: list[float] = []
        seconds: list[float] = []
        with ExitStack() as stack:
            events = EventLog.disabled()
            publisher = stack.enter_context(closing(StreamPublisher(LOOPBACK, 0, events)))
            relays = {f"g{n}": relay_address(LOOPBACK) for n in range(READERS)} if variant != "directly" else {}
            found = routes(relays, [f"g{n}" for n in range(READERS)], publisher.address)
            fetchers: list[Fetcher] = []
            for one, sources in found.items():
                if relays:
                    fetcher: Fetcher = Relay(sources, relays[one], 0, events, stall_s=60)
                else:
                    fetcher = StreamFetcher(sources, 0, events, stall_s=60)
                fetchers.append(stack.enter_context(closing(fetcher)))
            for number, version in enumerate(versions):
                before = publisher.traffic.bytes_sent
                digest = publisher.publish(number, version.items()).digest
                started = time.monotonic()
                for fetcher, sources in zip(fetchers, found.values(), strict=True):
                    fetcher.want(number, digest, sources)
                snapshots = [arrive(fetcher, number) for fetcher in fetchers]
                seconds.append((time.monotonic() - started) * 1e3)
                for snapshot in snapshots:
                    exact(snapshot, version)
                multiples.append((publisher.traffic.bytes_sent - before) / snapshots[0].bytes)
        rows += [
            row(name, f"{variant}: snapshot, bytes / one", "x", multiples[:1]),
            row(name, f"{variant}: deltas, bytes / one", "x", multiples[1:]),
            row(name, f"{variant}: deltas, all verified", "ms", seconds[1:]),
        ]
    return rows


def run(layers: int = ALL_LAYERS) -> list[Row]:
    torch.manual_seed(0)
    small = demo_updates()
    rows = travel("demo fp32", small)
    rows += coding("demo fp32", capture(0, small[-2].items()), capture(1, small[-1].items()))
    name = f"0.5B shape, {layers} layers, bf16"
    with tempfile.TemporaryDirectory() as folder:
        large = Stored(Path(folder), updates(half_billion_shape(layers), 1e-6, torch.bfloat16, tokens=32))
        rows += travel(name, large)
        coded = coding(name, capture(0, large[-2].items()), capture(1, large[-1].items()))
        rows += coded if layers == ALL_LAYERS else [*coded, scaled(coded, large[-1], layers)]
        rows += resume(large[-1])
        kept = tuple(f".layers.{n}." for n in range(FAN_OUT_LAYERS))
        return rows + fan_out(
            [{n: t for n, t in large[number].items() if any(k in n for k in kept)} for number in range(4)]
        )
