"""How a GPU op is measured: checked first, timed by events in turn with its peers, held against measured ceilings."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import Row, row

Thunk = Callable[[], object]
NOT_RUN = "not run: out of time"


class OutOfTime(Exception):
    """What was to begin after the deadline."""


@dataclass
class Bench:
    """One process's measurements. `dry` runs everything on tiny CPU tensors, to see that it runs."""

    dry: bool
    deadline: float
    matmul_tflops: float = float("nan")
    copy_tbs: float = float("nan")
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    keep: Callable[[], None] = lambda: None
    """Called whenever there is more to keep."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.dry else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Random, never zeros: a matrix product on zeros runs faster than on real data."""
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(scale)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A process edge: on a lent GPU one op that fails must not cost the others their measurements.

        Past the deadline it raises OutOfTime, which the one around it reports: a body cannot be skipped from here.
        """
        if self.late():
            raise OutOfTime(what)
        try:
            yield
        except OutOfTime as error:
            self.problem(f"{what}: {error}", NOT_RUN)
        except Exception:
            self.problem(what, traceback.format_exc(limit=4))

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def problem(self, what: str, text: str) -> None:
        self.problems.append(f"{what}: {text}")
        self.keep()
        print(f"PROBLEM {what}: {text}", file=sys.stderr, flush=True)

    def check(self, name: str, what: str, error: float, cap: float) -> None:
        """An error against float64, as a row of its own. NaN never passes."""
        passed = error <= cap
        print(f"  {'ok  ' if passed else 'FAIL'} {name}: {what} {error:.3g} (cap {cap:.3g})", flush=True)
        self.rows.append(row(name, what, "error", [error], cap=cap, passed=passed))
        if not passed:
            self.problems.append(f"{name}: {what} {error:.4g} is over the cap {cap:.4g}")
        self.keep()

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def once(self, thunk: Thunk, calls: int) -> float:
        """Milliseconds of one call. Events, so that the host's own time does not count unless the GPU waits for it."""
        if self.dry:
            started = time.perf_counter()
            thunk()
            return (time.perf_counter() - started) * 1e3 / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        thunk()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / calls

    def compare(
        self,
        name: str,
        variants: Mapping[str, Thunk],
        *,
        flop: float = 0.0,
        moved: float = 0.0,
        repeats: int = 15,
        calls: int = 1,
    ) -> dict[str, float]:
        """Median milliseconds of each variant, in turn; each makes `calls` calls of `flop` and `moved` bytes."""
        alive: dict[str, Thunk] = {}
        for variant, thunk in variants.items():
            if self.late():
                self.problem(f"{name} {variant}", NOT_RUN)
                continue
            with self.guarded(f"{name} {variant}"):
                for _ in range(0 if self.dry else 3):
                    thunk()
                self.synchronize()
                alive[variant] = thunk
        times: dict[str, list[float]] = {variant: [] for variant in alive}
        for turn in range(1 if self.dry else repeats):
            # Once is enough when time runs out: what has been measured is worth more than its spread.
            if turn and self.late():
                break
            for variant, thunk in list(alive.items()):
                try:
                    times[variant].append(self.once(thunk, calls))
                except Exception:
                    # A process edge, as in `guarded`: one that runs out of memory now and then leaves the comparison.
                    self.problem(f"{name} {variant}", traceback.format_exc(limit=4))
                    del alive[variant]
        return {k: self._report(name, k, values, flop, moved) for k, values in times.items() if values}

    def _report(self, name: str, variant: str, values: list[float], flop: float, moved: float) -> float:
        median = statistics.median(values)
        notes: dict[str, float] = {}
        if flop:
            notes["tflops"] = flop / median / 1e9
            notes["percent_of_matmul"] = 100 * notes["tflops"] / self.matmul_tflops
        if moved:
            notes["tbs"] = moved / median / 1e9
            notes["percent_of_copy"] = 100 * notes["tbs"] / self.copy_tbs
        # The ceilings themselves have none, and JSON has no NaN.
        notes = {k: v for k, v in notes.items() if math.isfinite(v)}
        self.rows.append(row(name, variant, "ms", values, flop=flop, bytes=moved, **notes))
        text = "  ".join(f"{k} {v:.4g}" for k, v in notes.items())
        print(f"  {name:<34} {variant:<26} {median:>10.4f} ms  {text}", flush=True)
        self.keep()
        return median

    def graphs(self, variants: Mapping[str, list[Thunk]]) -> dict[str, Thunk]:
        """`graphed`, one by one: what cannot be captured is reported and left out."""
        found: dict[str, Thunk] = {}
        for name, calls in variants.items():
            with self.guarded(f"graph of {name}"):
                found[name] = self.graphed(calls)
        return found

    def forget(self) -> None:
        """Give cached memory back, and notice here if the device is no longer usable."""
        if not self.dry:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def graphed(self, calls: list[Thunk]) -> Thunk:
        """One thunk that makes all calls back to back from a CUDA graph: microseconds, without the host's launches.

        Each call has inputs of its own, so that together they pass the L2.
        """
        if self.dry:
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def peak(self, name: str, variant: str, thunk: Thunk) -> None:
        """Gigabytes of device memory that a call takes beyond what is there before it."""
        if self.dry:
            return
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        thunk()
        self.synchronize()
        taken = (torch.cuda.max_memory_allocated() - before) / 1e9
        print(f"  {name:<34} {variant:<26} {taken:>10.3f} GB more", flush=True)
        self.rows.append(row(name, variant, "GB", [taken]))

    def peer(self, module: str) -> Any:
        """A package people use, or None: one that is absent, or broken beside this torch, is said and passed over."""
        try:
            return importlib.import_module(module)
        except Exception as error:
            # A process edge, as in `guarded`: what a package of others raises at import is not known beforehand.
            print(f"  {module} is not compared with: {type(error).__name__}: {error}", flush=True)
            return None

    def compiled(self, function: Callable[..., object]) -> Callable[..., object]:
        """torch.compile; in a dry run the function itself, since importing the compiler alone takes seconds."""
        return function if self.dry else torch.compile(function)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over the expected one's."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
