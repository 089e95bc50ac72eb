"""ppo_head beside what people use today, in turn: eager code, torch.compile, liger-kernel, cut-cross-entropy.

A process of its own: what a peer does to the device must not cost our own figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_head import EAGER_ROWS, SHAPES, TINY, problem, run
from benchmarks.gpu_measure import Bench, Thunk


def eager_step(hidden: Tensor, weight: Tensor, targets: Tensor, sampled: Tensor, advantages: Tensor) -> Tensor:
    """What people write: a chunk of bfloat16 logits, float32 log-softmax, PPO loss; no entropy, no statistics."""
    log_p = torch.log_softmax((hidden @ weight.T).float(), 1)
    ratio = (log_p.gather(1, targets[:, None]).squeeze(1) - sampled).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def eager(p: dict[str, Tensor], step: Callable[..., Any] = eager_step) -> Thunk:
    leaves = p | {k: p[k].detach().requires_grad_() for k in ("hidden", "weight")}
    rows = len(p["hidden"])

    def whole() -> None:
        leaves["hidden"].grad = leaves["weight"].grad = None
        for start in range(0, rows, EAGER_ROWS):
            at = slice(start, start + EAGER_ROWS)
            rest = (leaves[k][at] for k in ("targets", "sampled", "advantages"))
            (step(leaves["hidden"][at], leaves["weight"], *rest) / rows).backward()

    return whole


def peers(bench: Bench, p: dict[str, Tensor]) -> dict[str, Thunk]:
    """Fused linear cross-entropies. They have no PPO, no statistics and no entropy: less work than ours."""
    found: dict[str, Thunk] = {}
    hidden, weight = (p[k].detach().requires_grad_() for k in ("hidden", "weight"))

    def differentiated(loss: Callable[..., Any]) -> Thunk:
        def step() -> None:
            hidden.grad = weight.grad = None
            loss(hidden, weight, p["targets"]).backward()

        return step

    if (liger := bench.peer("liger_kernel.transformers.functional")) is not None:
        # (hidden, weight, targets), the mean over tokens
        found["liger (cross-entropy only)"] = differentiated(liger.liger_fused_linear_cross_entropy)
    if (cut := bench.peer("cut_cross_entropy")) is not None:
        found["cut-cross-entropy"] = differentiated(cut.linear_cross_entropy)
    return {} if bench.dry else found


def beside(bench: Bench) -> None:
    for rows, vocab, width in TINY if bench.dry else SHAPES:
        name, flop = f"ppo_head {rows}x{vocab}x{width} beside peers", 6.0 * rows * vocab * width
        with bench.guarded(name):
            p = problem(bench, rows, vocab, width)
            variants: dict[str, Thunk] = {"orz_kernels": lambda p=p: run(bench, p)}  # type: ignore[misc]
            with bench.guarded(f"{name}: peers"):
                variants |= peers(bench, p)
            variants["eager, chunked"] = eager(p)
            variants["torch.compile, chunked"] = eager(p, bench.compiled(eager_step))
            bench.compare(name, variants, flop=flop, repeats=3)
            del p, variants
        with bench.guarded(f"{name} memory"):
            bench.forget()


SECTIONS: dict[str, tuple[Callable[[Bench], None], ...]] = {"peers": (beside,)}
