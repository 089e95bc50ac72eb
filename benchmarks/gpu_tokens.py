"""The ops over tokens and over logits on a GPU: ceilings, gae, whiten, losses, logprob."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_measure import Bench, Thunk, largest, relative
from orz_async.ops import reference

SETS = 8  # sets of inputs in turn: together past the 50 MB of a Hopper L2


def backends(bench: Bench) -> dict[str, ModuleType]:
    """The kernels as the package offers them; without a working nvcc the CUDA C++ ones are missing, and reported."""
    from orz_async.ops import triton

    found: dict[str, ModuleType] = {}
    with bench.guarded("build of csrc/cuda"):
        from orz_kernels import cuda as binding

        # In a dry run there is no device to launch on, but the library is looked for all the same.
        if not bench.dry:
            binding.build()
            from orz_async.ops import cuda

            found["cuda"] = cuda
    return found | {"triton": triton}


def ceilings(bench: Bench) -> None:
    """What this device reaches at the two things every op is made of."""
    n = bench.size(8192, 64)
    pairs = [(bench.randn(n, n, dtype=torch.bfloat16), bench.randn(n, n, dtype=torch.bfloat16)) for _ in range(2)]
    ms = bench.compare("ceiling", {"matmul bf16 8192^3": lambda: [a @ b for a, b in pairs]}, flop=2.0 * n**3, calls=2)
    bench.matmul_tflops = 2.0 * n**3 / min(ms.values(), default=float("nan")) / 1e9
    size = bench.size(2**32, 2**12)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=bench.device).random_().unbind()
    ms = bench.compare("ceiling", {"copy 4 GiB": lambda: target.copy_(source)}, moved=2.0 * size)
    bench.copy_tbs = 2.0 * size / min(ms.values(), default=float("nan")) / 1e9


def ragged(bench: Bench, total: int) -> Tensor:
    """Sequence bounds: lengths of 1 to 4,096 tokens, and one of 131,072."""
    longest = bench.size(131_072, 40)
    lengths = torch.randint(1, bench.size(4096, 30), (total,)).cumsum(0)
    inner = lengths[lengths < total - longest]
    return torch.cat([torch.tensor([0]), inner, torch.tensor([total])]).to(torch.int32).to(bench.device)


def gae(bench: Bench) -> None:
    n = bench.size(2**20, 500)
    sets = [(bench.randn(n), bench.randn(n)) for _ in range(bench.size(SETS, 1))]
    starts = ragged(bench, n)
    mask = torch.rand(n, device=bench.device) < 0.9
    boot = bench.randn(len(starts) - 1)
    variants: dict[str, list[Thunk]] = {}
    for name, backend in backends(bench).items():
        with bench.guarded(f"gae {name}"):
            for gamma, lam, m, b in ((1.0, 1.0, None, None), (0.99, 0.95, mask, boot)):
                found = backend.gae(*sets[0], starts, gamma, lam, m, b)
                wide = None if b is None else b.double()
                rewards, values = (x.double() for x in sets[0])
                expected = reference.gae(rewards, values, starts, gamma, lam, m, wide)
                cap = 2e-5 * max(1.0, float(expected[0].abs().max()))
                bench.check(f"gae {name}", f"advantages ({gamma}, {lam})", largest(found[0], expected[0]), cap)
                again = [backend.gae(*sets[0], starts, gamma, lam, m, b) for _ in range(bench.size(20, 1))]
                same = all(torch.equal(x[0], found[0]) for x in again)
                bench.check(f"gae {name}", "runs that differ", float(not same), 0.0)
            variants[name] = [_call(backend.gae, *x, starts, 0.99, 0.95, None, None) for x in sets]
    bench.compare("gae 1M tokens", bench.graphs(variants), moved=16.0 * n, calls=len(sets))
    bench.compare(
        "gae 1M tokens", {"reference (eager)": _call(reference.gae, *sets[0], starts, 0.99, 0.95, None, None)}
    )


def _call(function: Callable[..., Any], *args: Any) -> Thunk:
    return lambda: function(*args)


def whiten(bench: Bench) -> None:
    n = bench.size(2**20, 500)
    sets = [bench.randn(n) + 100 for _ in range(bench.size(SETS, 1))]
    from orz_async.ops import triton

    def eager(x: Tensor) -> Tensor:
        return (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)

    def ours(x: Tensor) -> Tensor:
        result: Tensor = triton.whiten(x, None, triton.moments(x, None), 1e-8)
        return result

    bench.check("whiten triton", "result", largest(ours(sets[0]), eager(sets[0].double())), 1e-4)
    functions = {"triton": ours, "eager": eager, "torch.compile": bench.compiled(eager)}
    variants = bench.graphs({name: [_call(f, x) for x in sets] for name, f in functions.items()})
    bench.compare("whiten 1M tokens", variants, moved=12.0 * n, calls=len(sets))


def losses(bench: Bench) -> None:
    """ppo_loss and value_loss with slopes and all statistics, one million tokens."""
    n = bench.size(2**20, 500)
    total = torch.tensor(float(n), device=bench.device)

    def inputs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        sampled, values = -bench.randn(n).abs(), bench.randn(n)
        policy = (sampled + bench.randn(n, scale=0.3), sampled, bench.randn(n))
        return policy, (values, values + bench.randn(n, scale=0.2), bench.randn(n))

    sets = [inputs() for _ in range(bench.size(SETS, 1))]
    tail, value_tail = (None, None, None, total, 0.2, 0.2, None, None), (None, total, 0.2)

    def simple(current: Tensor, sampled: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its slope alone, as one would write them: none of the statistics."""
        ratio = (current - sampled).exp()
        flat = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
        gain = -advantages / n
        return torch.maximum(gain * ratio, gain * ratio.clamp(0.8, 1.2)).sum(), torch.where(flat, 0.0, gain * ratio)

    variants: dict[str, list[Thunk]] = {}
    for name, backend in backends(bench).items():
        with bench.guarded(f"losses {name}"):
            for op, args, rest in (("ppo_loss", sets[0][0], tail), ("value_loss", sets[0][1], value_tail)):
                found = getattr(backend, op)(*args, *rest)
                wide = [x.double() if isinstance(x, Tensor) else x for x in (*args, *rest)]
                expected = getattr(reference, op)(*wide)
                bench.check(f"{op} {name}", "slopes", relative(found[1], expected[1]), 1e-5)
                scale = expected[2].abs().clamp(min=1.0)
                bench.check(f"{op} {name}", "statistics", largest(found[2] / scale, expected[2] / scale), 1e-4)
                again = [getattr(backend, op)(*args, *rest)[2] for _ in range(bench.size(20, 1))]
                bench.check(
                    f"{op} {name}", "runs that differ", float(any(not torch.equal(x, found[2]) for x in again)), 0.0
                )
            variants[name] = [_both(backend, p, v, tail, value_tail) for p, v in sets]
    bench.compare("ppo_loss + value_loss 1M", bench.graphs(variants), moved=32.0 * n, calls=len(sets))
    compiled = bench.compiled(simple)
    plain: dict[str, Thunk] = {
        "reference (eager)": _both(reference, *sets[0], tail, value_tail),
        "torch.compile, no statistics": _call(compiled, *sets[0][0]),
    }
    bench.compare("ppo_loss + value_loss 1M", plain)


def _both(backend: ModuleType, policy: Any, value: Any, tail: Any, value_tail: Any) -> Thunk:
    return lambda: (backend.ppo_loss(*policy, *tail), backend.value_loss(*value, *value_tail))


def logprob(bench: Bench) -> None:
    """From materialised bfloat16 logits: one read forward, one read and one write backward."""
    from orz_async.ops import triton

    _check_logprob(bench, triton)
    n, vocab = bench.size(8192, 4), bench.size(151_936, 300)
    logits, targets = (
        bench.randn(n, vocab, dtype=torch.bfloat16, scale=3.0),
        torch.randint(vocab, (n,), device=bench.device),
    )
    g, h = bench.randn(n), bench.randn(n)
    kept = triton.logprob_forward(logits, targets, 1.0)

    def eager(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(z.float(), 1)
        return log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(1)

    forward: dict[str, Thunk] = {
        "triton": lambda: triton.logprob_forward(logits, targets, 1.0),
        "eager": lambda: eager(logits),
        "torch.compile": _call(bench.compiled(eager), logits),
    }
    size = 2.0 * n * vocab
    bench.compare("logprob forward", forward, moved=size)
    backward: dict[str, Thunk] = {
        "triton in place": lambda: triton.logprob_backward(logits, targets, kept[2], kept[1], g, h, 1.0, True),
    }
    bench.compare("logprob backward", backward, moved=2 * size)
    with bench.guarded("logprob liger"):
        functional = bench.peer("liger_kernel.transformers.functional")
        if functional is not None and not bench.dry:
            leaf = logits.detach().requires_grad_()

            def liger() -> None:
                # It writes the gradient over the logits in forward: from the second call on they are no logits, and
                # take the same time.
                leaf.grad = None
                functional.liger_cross_entropy(leaf, targets).backward()

            bench.compare("logprob forward + backward", {"liger (cross-entropy only)": liger}, moved=3 * size)


def _check_logprob(bench: Bench, triton: ModuleType) -> None:
    """Ragged vocabularies, more than 65,535 rows, more than 2^31 logits, all-negative and -inf."""
    shapes = [(16, 1000), (16, 151_936), (70_000, 1000), (14_500, 151_936)]
    for n, vocab in [(3, 40), (2, 1000)] if bench.dry else shapes:
        with bench.guarded(f"logprob check {n} x {vocab}"):
            logits = bench.randn(n, vocab, dtype=torch.bfloat16, scale=4.0).sub_(60)
            logits[:, 1] = -torch.inf
            targets = torch.randint(2, vocab, (n,), device=bench.device)
            logprobs, entropy, logsumexp = triton.logprob_forward(logits, targets, 0.9)
            some = torch.cat([torch.arange(min(n, 8)), torch.arange(max(n - 8, 0), n)]).to(bench.device)
            want = reference.logprob_forward(logits[some].double(), targets[some], 0.9)
            name = f"logprob {n} x {vocab}"
            bench.check(name, "log-probs", largest(logprobs[some], want[0]), 2e-5)
            bench.check(name, "entropy", largest(entropy[some], want[1]), 1e-4)
            g, h = bench.randn(n), bench.randn(n)
            args = (targets[some], want[2], want[1], g[some].double(), h[some].double(), 0.9, False)
            expected = reference.logprob_backward(logits[some].double(), *args)
            grad = triton.logprob_backward(logits, targets, logsumexp, entropy, g, h, 0.9, True)
            bench.check(name, "gradient", relative(grad[some], expected), 4e-3)


SECTIONS: dict[str, tuple[Callable[[Bench], None], ...]] = {
    "ceilings": (ceilings,),
    "tokens": (gae, whiten, losses),
    "logits": (logprob,),
}
