"""The C++ ops on this machine's cores, side by side with plain Python, eager torch and what a peer would write.

gae       1M packed tokens: one core, against the reference and against a loop over tokens
pack      8,192 lengths over 16 ranks, against the same algorithm in Python
delta     encode and apply at 2 % changed words, against numpy and against index-and-value lists in torch
ppo_head  T = 4,096, V = 32,000, D = 512 float32, forward + backward, against eager torch; peak memory of both
crc32c    against zlib's CRC-32
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.protocol import Row, interleave, row
from orz_async import ops
from orz_async.ops import backend, reference

Vector = Sequence[float] | NDArray[Any]

MEGATOKEN = 2**20
DELTA_WORDS = 2**25
HEAD = (4096, 32000, 512)
TINY_HEAD = (2000, 40, 128)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def response_lengths(count: int) -> list[int]:
    """Long-tailed, with a limit that some hit, as a reasoning model's are."""
    draw = random.Random(0)
    return [min(8192, max(16, int(draw.lognormvariate(6.5, 1.0)))) for _ in range(count)]


def gae_python_loop(rewards: Vector, values: Vector, cu_seqlens: list[int], gamma: float, lam: float) -> list[float]:
    """As trainers ship it: one token after the other, indexing what they were given."""
    advantages = [0.0] * len(rewards)
    for start, end in pairwise(cu_seqlens):
        next_value = next_advantage = 0.0
        for t in range(end - 1, start - 1, -1):
            delta = rewards[t] + gamma * next_value - values[t]
            advantages[t] = next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
    return advantages


def bench_gae() -> list[Row]:
    lengths: list[int] = []
    for length in response_lengths(4096):
        if sum(lengths) + length < MEGATOKEN:
            lengths.append(length)
    lengths.append(MEGATOKEN - sum(lengths))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    rewards, values = torch.randn((2, MEGATOKEN)).unbind()
    bounds = cu_seqlens.tolist()
    lists, arrays = (rewards.tolist(), values.tolist()), (rewards.numpy(), values.numpy())
    call = partial(ops.gae, rewards, values, cu_seqlens, gamma=0.99, lam=0.95)

    def many() -> None:
        for _ in range(20):
            call()

    def in_reference() -> None:
        with backend.using("reference"):
            call()

    variants: dict[str, tuple[Callable[[], object], int]] = {
        "c++ (1 core)": (many, 20),
        "reference": (in_reference, 1),
        "python loop over arrays": (lambda: gae_python_loop(arrays[0], arrays[1], bounds, 0.99, 0.95), 1),
        "python loop over lists": (lambda: gae_python_loop(lists[0], lists[1], bounds, 0.99, 0.95), 1),
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    with threads(1):
        many()
        for _ in range(5):
            for variant, (run_it, calls) in variants.items():
                started = time.perf_counter()
                run_it()
                times[variant].append((time.perf_counter() - started) * 1e3 / calls)
    fast = times["c++ (1 core)"]
    return [
        row("gae_1M", variant, "ms", taken)
        | {"ratio_to_first": statistics.median(t / f for t, f in zip(taken, fast, strict=True))}
        for variant, taken in times.items()
    ]


def bench_pack() -> list[Row]:
    lengths = response_lengths(8192)
    cost = (1.0, 1e-4)
    rows = interleave(
        "pack_8192_16_ranks",
        {
            "c++": lambda: ops.pack(lengths, max_tokens=16384, num_ranks=16, cost=cost),
            "python, same algorithm": lambda: reference.pack(np.array(lengths), 16384, 16, cost),
        },
        repeats=5,
    )
    packed = ops.pack(lengths, max_tokens=16384, num_ranks=16, cost=cost)
    loads = [sum(cost[0] * lengths[i] + cost[1] * lengths[i] ** 2 for b in rank for i in b) for rank in packed]
    imbalance = max(loads) / (sum(loads) / len(loads))
    return [*rows, row("pack_8192_16_ranks", "imbalance, max / mean", "ratio", [imbalance])]


def sparse_peer(new: Tensor, old: Tensor) -> Callable[[], object]:
    """What one writes in torch in two lines: 64-bit indices and values."""

    def both() -> object:
        indices = (new != old).nonzero().squeeze(1)
        values = new[indices]
        return old.clone().index_copy_(0, indices, values)

    return both


def bench_delta() -> list[Row]:
    old = torch.randn(DELTA_WORDS).bfloat16()
    changed = torch.rand(DELTA_WORDS) < 0.02
    new = old.clone()
    new.view(torch.int16)[changed] ^= 1
    payload = ops.delta_encode(new, old)
    target = old.clone()
    rows: list[Row] = []

    def both(count: int) -> None:
        target.copy_(old)
        ops.delta_apply(target, ops.delta_encode(new, old, threads=count), threads=count)

    def apply(count: int) -> None:
        target.copy_(old)
        ops.delta_apply(target, payload, threads=count)

    variants: dict[str, Callable[[], object]] = {
        "copy of the base, in every row": lambda: target.copy_(old),
        f"encode ({cores()} cores)": lambda: ops.delta_encode(new, old, threads=cores()),
        f"apply ({cores()} cores)": lambda: apply(cores()),
        f"encode + apply ({cores()} cores)": lambda: both(cores()),
        "encode + apply (1 core)": lambda: both(1),
        "torch nonzero + index_copy_": sparse_peer(new, old),
    }
    with threads(cores()):
        rows += interleave("delta_bf16_2%", variants, repeats=9)
    medians = {r["variant"]: r["median"] for r in rows}
    copy = medians["copy of the base, in every row"]
    gigabytes = new.nbytes / 1e9
    for count in (cores(), 1):
        seconds = (medians[f"encode + apply ({count} core{'s' if count > 1 else ''})"] - copy) / 1e3
        rows.append(row("delta_bf16_2%", f"encode + apply less copy, {count} core(s)", "GB/s", [gigabytes / seconds]))
    rows.append(row("delta_bf16_2%", "payload / tensor", "ratio", [len(payload) / new.nbytes]))
    return rows


def head_problem(num_tokens: int, vocabulary: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn((num_tokens, width), generator=generator).requires_grad_(),
        "weight": (torch.randn((vocabulary, width), generator=generator) / width**0.5).requires_grad_(),
        "targets": torch.randint(vocabulary, (num_tokens,), generator=generator),
        "sampled": -torch.rand(num_tokens, generator=generator) * 10,
        "advantages": torch.randn(num_tokens, generator=generator),
    }


def fused_head(p: dict[str, Tensor]) -> None:
    out = ops.ppo_head(*p.values(), denominator=len(p["targets"]))
    out.loss.backward()  # type: ignore[no-untyped-call]
    p["hidden"].grad = p["weight"].grad = None


def eager_head(p: dict[str, Tensor], with_entropy: bool = False) -> None:
    """The least a trainer does: no statistics; the entropy, which ppo_head always gives, on request."""
    log_p = torch.log_softmax(p["hidden"] @ p["weight"].T, dim=1)
    logprobs = log_p.gather(1, p["targets"][:, None]).squeeze(1)
    if with_entropy:
        with torch.no_grad():
            (-(log_p.exp() * log_p)).sum(1)
    ratio = (logprobs - p["sampled"]).exp()
    objective = torch.min(ratio * p["advantages"], ratio.clamp(0.8, 1.2) * p["advantages"])
    (-objective.sum() / len(logprobs)).backward()  # type: ignore[no-untyped-call]
    p["hidden"].grad = p["weight"].grad = None


HEADS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "ppo_head": fused_head,
    "eager torch": eager_head,
    "eager torch + entropy": partial(eager_head, with_entropy=True),
}


def peak_bytes(variant: str) -> float:
    """Of a fresh process: how far its resident memory rises above what inputs and libraries hold already."""
    command = [sys.executable, "-m", "benchmarks.cpu_ops", "--peak", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return float(done.stdout.split()[-1])


def measure_peak(variant: str) -> float:
    with threads(cores()):
        HEADS[variant](head_problem(*TINY_HEAD))
        p = head_problem(*HEAD)
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
        before = status_kilobytes("VmRSS")
        HEADS[variant](p)
        return (status_kilobytes("VmHWM") - before) * 1024


def status_kilobytes(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected a line {name}, found none")


def bench_head() -> list[Row]:
    rows: list[Row] = []
    with threads(cores()):
        for name, shape, repeats, calls in (("tiny", TINY_HEAD, 9, 5), ("T4096_V32000_D512", HEAD, 5, 1)):
            p = head_problem(*shape)
            variants = {
                variant: lambda run=run, p=p, n=calls: [run(p) for _ in range(n)] for variant, run in HEADS.items()
            }
            rows += interleave(f"ppo_head_{name}", variants, repeats=repeats, calls=calls)
    if Path("/proc/self/clear_refs").exists():
        peaks = {variant: peak_bytes(variant) / 2**20 for variant in HEADS}
        for variant, peak in peaks.items():
            measured = row("ppo_head_T4096_V32000_D512 peak", variant, "MiB", [peak])
            rows.append(measured | {"ratio_to_first": peak / peaks["ppo_head"]})
    return rows


def bench_crc32c() -> list[Row]:
    from orz_async import _C

    data = np.random.default_rng(0).bytes(2**26)
    return interleave(
        "crc_64MiB", {"crc32c, c++": lambda: _C.crc32c(data), "crc32, zlib": lambda: zlib.crc32(data)}, repeats=7
    )


def run() -> list[Row]:
    torch.manual_seed(0)
    return [*bench_gae(), *bench_pack(), *bench_delta(), *bench_head(), *bench_crc32c()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_ops", description=__doc__)
    parser.add_argument("--peak", choices=sorted(HEADS), help="print the peak memory of one variant, in bytes")
    chosen = parser.parse_args().peak
    if chosen:
        print(measure_peak(chosen))
    else:
        from benchmarks.protocol import table

        print(table(run()))
