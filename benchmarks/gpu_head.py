"""The LM-head ops on a GPU: ppo_head and head_logprob against float64 and against the ceilings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_measure import Bench, Thunk, largest, relative
from orz_async.ops import reference

EAGER_ROWS = 2048  # rows of logits eager code holds at a time


def problem(
    bench: Bench, rows: int, vocab: int, width: int, *, shared: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Hidden states, head and targets, with sampled log-probs near the current ones, as after a few updates."""
    hidden, weight = bench.randn(rows, width), bench.randn(vocab, width, scale=width**-0.5)
    if shared:
        weight += shared * width**-0.5
        hidden += 1.0
    targets = torch.randint(vocab, (rows,), device=bench.device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    sampled = torch.empty(rows, device=bench.device)
    for start in range(0, rows, EAGER_ROWS):
        at = slice(start, start + EAGER_ROWS)
        sampled[at] = torch.log_softmax((hidden[at] @ weight.T).float(), 1).gather(1, targets[at, None]).squeeze(1)
    sampled = (sampled + bench.randn(rows, scale=0.1)).clamp(max=0)
    return {"hidden": hidden, "weight": weight, "targets": targets, "sampled": sampled, "advantages": bench.randn(rows)}


def run(bench: Bench, p: dict[str, Tensor], **how: Any) -> Any:
    """`ppo_head` with gradients of hidden and weight."""
    from orz_kernels import ppo_head

    total = torch.tensor(float(len(p["hidden"])), device=bench.device)
    return ppo_head.compute(
        p["hidden"], p["weight"], p["targets"], p["sampled"], p["advantages"], how.get("proximal"), how.get("mask"),
        total, 0.2, 0.2, None, None, 1.0, how.get("chunk"), True, True, how.get("variant"), how.get("tiles"),
    )  # fmt: skip


def expected(
    bench: Bench, p: dict[str, Tensor], proximal: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy and gradients in float64 by the textbook softmax, in memory of one [rows, V] matrix or two."""
    hidden, weight, at = p["hidden"].double(), p["weight"].double(), p["targets"][:, None]
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    logprobs = log_p.gather(1, at).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    total = torch.tensor(float(len(hidden)), dtype=torch.float64, device=bench.device)
    wide = (p["sampled"].double(), p["advantages"].double(), None if proximal is None else proximal.double())
    slopes = reference.ppo_loss(logprobs, *wide, None, None, total, 0.2, 0.2, None, None)[1]
    dz = log_p.exp_().mul_(-slopes[:, None]).scatter_add_(1, at, slopes[:, None])
    return logprobs, entropy, dz @ weight, dz.T @ hidden


def check_one(bench: Bench, name: str, p: dict[str, Tensor], proximal: Tensor | None = None, **how: Any) -> None:
    want = expected(bench, p, proximal)
    for variant in ("fused", "library"):
        with bench.guarded(f"{name} {variant}"):
            found = run(bench, p, variant=variant, proximal=proximal, **how)
            label = f"ppo_head {variant} {name}"
            bench.check(label, "log-probs", largest(found[3], want[0]), 2e-5)
            bench.check(label, "entropy", largest(found[4], want[1]), 1e-4)
            bench.check(label, "dX", relative(found[1], want[2]), 4e-3)
            bench.check(label, "dW", relative(found[2], want[3]), 4e-3)


def check(bench: Bench) -> None:
    """The matrix: ragged rows and vocabularies, shared direction, overflow of the reference, masks, repeats, chunks."""
    shapes = [(300, 1000, 64), (513, 151_936, 896), (257, 152_064, 3584), (1, 32_000, 128)]
    for rows, vocab, width in [] if bench.dry else shapes:
        check_one(bench, f"{rows} x {vocab} x {width}", problem(bench, rows, vocab, width), chunk=max(rows // 3, 1))
    rows, vocab, width = (8, 100, 16) if bench.dry else (300, 32_000, 512)
    check_one(bench, "shared direction", problem(bench, rows, vocab, width, shared=3.0))
    p = problem(bench, rows, vocab, width)
    near = p["sampled"].clone()
    p["hidden"] *= 8
    p["sampled"] = torch.full_like(near, -0.01)
    now = (
        torch.log_softmax(p["hidden"].double() @ p["weight"].double().T, 1).gather(1, p["targets"][:, None]).squeeze(1)
    )
    check_one(bench, "overflow", p, proximal=now.float())
    p = problem(bench, rows, vocab, width)
    for variant in ("fused", "library"):
        with bench.guarded(f"repeats {variant}"):
            first = run(bench, p, variant=variant)
            again = [run(bench, p, variant=variant) for _ in range(bench.size(20, 1))]
            same = all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))
            bench.check(f"ppo_head {variant}", "runs that differ", float(not same), 0.0)
            mask = torch.arange(rows, device=bench.device) % 3 > 0
            some = run(bench, {k: v[mask] if k != "weight" else v for k, v in p.items()}, variant=variant)
            hidden = torch.where(mask[:, None], p["hidden"], torch.nan)
            masked = run(bench, p | {"hidden": hidden}, variant=variant, mask=mask)
            bench.check(f"ppo_head {variant}", "rows kept by a mask", largest(masked[3][mask], some[3]), 1e-6)
            bench.check(f"ppo_head {variant}", "rows hidden by a mask", float(masked[1][~mask].abs().max()), 0.0)


def ours(bench: Bench, p: dict[str, Tensor]) -> dict[str, Thunk]:
    from orz_kernels import head

    found: dict[str, Thunk] = {"library": lambda: run(bench, p, variant="library")}
    for t in head.CANDIDATES[:1] if bench.dry else head.CANDIDATES:
        name = f"fused {t.rows}x{t.columns}x{t.depth} w{t.warps} s{t.stages}"
        tiles = None if bench.dry else t
        found[name] = lambda tiles=tiles: run(bench, p, variant="fused", tiles=tiles)  # type: ignore[misc]
    return found


SHAPES = ((32_768, 151_936, 3584), (32_768, 151_936, 896))
TINY = ((9, 200, 32),)


def ppo_head(bench: Bench) -> None:
    """Forward and backward, PPO, entropy and statistics included, at the widths of a 7B and of a 0.5B model."""
    for rows, vocab, width in TINY if bench.dry else SHAPES:
        name, flop = f"ppo_head {rows}x{vocab}x{width}", 6.0 * rows * vocab * width
        with bench.guarded(name):
            p = problem(bench, rows, vocab, width)
            bench.compare(name, ours(bench, p), flop=flop, repeats=7)
            for variant in ("library", "fused"):
                with bench.guarded(f"{name} memory of {variant}"):
                    bench.peak(name, variant, lambda p=p, v=variant: run(bench, p, variant=v))  # type: ignore[misc]
            with bench.guarded(f"{name} through orz_async.ops"):
                _public(bench, name, p, flop)
            del p
        with bench.guarded(f"{name} memory"):
            bench.forget()


def _public(bench: Bench, name: str, p: dict[str, Tensor], flop: float) -> None:
    """Through `orz_async.ops`, autograd and all, as the learner calls it."""
    from orz_async import ops
    from orz_async.ops import backend

    hidden, weight = (p[k].detach().requires_grad_() for k in ("hidden", "weight"))

    def step() -> None:
        hidden.grad = weight.grad = None
        rest = (p["targets"], p["sampled"], p["advantages"])
        loss = ops.ppo_head(hidden, weight, *rest, denominator=float(len(hidden))).loss
        loss.backward()  # type: ignore[no-untyped-call]

    with backend.using("triton"):
        bench.compare(name, {"orz_async.ops, autograd": step}, flop=flop, repeats=5)


def products(bench: Bench) -> None:
    """The library's three matrix products alone: what ppo_head could reach if all else were free."""
    from orz_kernels.head import product, subtract_product

    rows, vocab, width = (8, 100, 16) if bench.dry else (8192, 151_936, 3584)
    hidden, weight = bench.randn(rows, width, dtype=torch.bfloat16), bench.randn(vocab, width, dtype=torch.bfloat16)
    logits = bench.randn(rows, vocab, dtype=torch.bfloat16)
    block = min(16_384, vocab)
    z, x, w = (torch.empty(s, device=bench.device) for s in ((rows, block), (rows, width), (vocab, width)))
    thunks: dict[str, Thunk] = {
        "dX = E @ W": lambda: product(logits, weight, x),
        "dW -= E.T @ X": lambda: subtract_product(w, logits.t(), hidden, first=False),
    }
    bench.compare(
        "products", {"z block": lambda: product(hidden, weight[:block].t(), z)}, flop=2.0 * rows * block * width
    )
    bench.compare("products", thunks, flop=2.0 * rows * vocab * width)


def head_logprob(bench: Bench) -> None:
    from orz_async.ops import triton

    rows, vocab, width = (9, 200, 32) if bench.dry else (8192, 151_936, 3584)
    p, g = problem(bench, rows, vocab, width), bench.randn(rows)
    args = (p["hidden"], p["weight"], p["targets"])
    some = min(rows, 200)
    small = (p["hidden"][:some].contiguous(), p["weight"], p["targets"][:some].contiguous())
    kept = triton.head_logprob_forward(*small, 1.0, None)
    log_p = torch.log_softmax(small[0].double() @ small[1].double().T, 1)
    bench.check("head_logprob", "log-probs", largest(kept[0], log_p.gather(1, small[2][:, None]).squeeze(1)), 2e-5)
    grads = triton.head_logprob_backward(*small, kept[2], kept[1], g[:some], None, 1.0, None, True, True)
    wide = g[:some].double()[:, None]
    dz = log_p.exp_().mul_(-wide).scatter_add_(1, small[2][:, None], wide)
    bench.check("head_logprob", "dX", relative(grads[0], dz @ small[1].double()), 4e-3)
    bench.check("head_logprob", "dW", relative(grads[1], dz.T @ small[0].double()), 4e-3)
    out = triton.head_logprob_forward(*args, 1.0, None)
    flop = 2.0 * rows * vocab * width
    bench.compare("head_logprob forward", {"triton": lambda: triton.head_logprob_forward(*args, 1.0, None)}, flop=flop)
    back = (out[2], out[1], g, None, 1.0, None, True, True)
    bench.compare(
        "head_logprob backward", {"triton": lambda: triton.head_logprob_backward(*args, *back)}, flop=3 * flop
    )


SECTIONS: dict[str, tuple[Callable[[Bench], None], ...]] = {"head": (check, ppo_head, products, head_logprob)}
