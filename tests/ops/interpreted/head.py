"""ppo_head and head_logprob: Triton, interpreted, against float64.

Caps: |d logp| <= 2e-5, entropy <= 1e-4, gradients <= 4e-3 relative (Frobenius), and at most twice the error of plain
bfloat16 code.
"""

from __future__ import annotations

import interpreter  # isort: skip

import ops_oracle
import pytest
import torch

from orz_kernels import head, ppo_head
from orz_kernels.head_logprob import head_logprob_backward, head_logprob_forward
from orz_kernels.ppo_loss import FIELDS

assert interpreter.ROOT.exists()


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty holds NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows, vocabulary, width, dtype=torch.bfloat16, scale=1.0, shared=0.0):
    """Hidden states, head and targets, and log-probs of the policies that sampled and that trained last."""
    hidden, weight = torch.randn(rows, width) * scale, torch.randn(vocabulary, width) / width**0.5
    if shared:  # a direction that all rows of the head have in common, as real models do, and hidden states along it
        weight += shared / width**0.5
        hidden += 1.0
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    logprobs, _ = ops_oracle.logprob(hidden.double() @ weight.double().T, targets)
    sampled = (logprobs + 0.2 * torch.randn(rows)).clamp(max=0).float()
    proximal = (logprobs + 0.1 * torch.randn(rows)).clamp(max=0).float()
    return {"hidden": hidden, "weight": weight, "targets": targets, "sampled": sampled, "proximal": proximal} | {
        "advantages": torch.randn(rows)
    }


def oracle(p, *, temperature=1.0, mask=None, proximal=False, **clips):
    hidden, weight = (p[k].double().requires_grad_() for k in ("hidden", "weight"))
    keep = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask
    logprobs, entropy = ops_oracle.logprob(hidden[keep] @ weight.T, p["targets"][keep], temperature)
    extra = {"proximal": p["proximal"][keep]} if proximal else {}
    terms = ops_oracle.policy_loss_terms(logprobs, p["sampled"][keep], p["advantages"][keep], **extra, **clips)
    loss = (terms / 7.0).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight)), logprobs.detach(), entropy.detach()


def tiles(variant, rows, vocabulary, width):
    """Small enough that there are several, big enough that the interpreter, which takes 10 ms a tile, has few."""
    columns = 512 if vocabulary < 2000 else 8192
    return head.Tiles(32 if rows > 16 else 16, columns, max(16, 2 ** (width - 1).bit_length()))


def run(p, *, temperature=1.0, mask=None, proximal=False, chunk=None, variant="fused", **clips):
    shape = tiles(variant, len(p["hidden"]), *p["weight"].shape)
    return ppo_head.compute(
        p["hidden"], p["weight"], p["targets"], p["sampled"], p["advantages"], p["proximal"] if proximal else None,
        mask, torch.tensor(7.0), clips.get("clip_low", 0.2), clips.get("clip_high", 0.2), clips.get("dual_clip"),
        clips.get("behaviour_cap"), temperature, chunk, True, True, variant, shape,
    )  # fmt: skip


def check(found, expected, mask=None, gradient_cap=4e-3):
    loss, grad_hidden, grad_weight, logprobs, entropy, _ = found
    keep = slice(None) if mask is None else mask
    assert float((logprobs[keep].double() - expected[3]).abs().max()) <= 2e-5
    assert float((entropy[keep].double() - expected[4]).abs().max()) <= 1e-4
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-4, abs=1e-5)
    assert ops_oracle.relative(grad_hidden, expected[1]) <= gradient_cap
    assert ops_oracle.relative(grad_weight, expected[2]) <= gradient_cap


def plain_bfloat16(p):
    """What people write: logits in bfloat16, float32 softmax, autograd."""
    hidden, weight = (p[k].clone().requires_grad_() for k in ("hidden", "weight"))
    logprobs = torch.log_softmax((hidden @ weight.T).float(), 1).gather(1, p["targets"][:, None]).squeeze(1)
    ratio = (logprobs - p["sampled"]).exp()
    gain = torch.minimum(ratio * p["advantages"], ratio.clamp(0.8, 1.2) * p["advantages"])
    return torch.autograd.grad(-gain.sum() / 7.0, (hidden, weight))


@pytest.mark.parametrize("variant", ["fused", "library"])
@pytest.mark.parametrize("shared", [0.0, 6.0])
def test_against_float64_and_against_plain_bfloat16(variant, shared):
    """Ragged rows and vocabulary, chunks that do not divide the rows."""
    p = problem(50, 1000, 64, shared=shared)
    expected = oracle(p)
    found = run(p, variant=variant, chunk=34)
    check(found, expected)
    for ours, plain, want in zip(found[1:3], plain_bfloat16(p), expected[1:3], strict=True):
        assert ops_oracle.relative(ours, want) <= 2 * ops_oracle.relative(plain, want)


# 32000: Llama 2. 128256: Llama 3. 151936 and 152064: Qwen2, small and large.
@pytest.mark.parametrize(
    ("vocabulary", "variant"), [(32000, "library"), (128256, "library"), (151936, "fused"), (152064, "library")]
)
def test_vocabularies(vocabulary, variant):
    p = problem(6, vocabulary, 32)
    p["targets"][0], p["targets"][1] = 0, vocabulary - 1
    logprobs, _ = ops_oracle.logprob(p["hidden"].double() @ p["weight"].double().T, p["targets"])
    p["sampled"] = (logprobs + 0.1).float()
    check(run(p, variant=variant), oracle(p))


@pytest.mark.parametrize(("variant", "dtype"), [("fused", torch.float32), ("library", torch.float16)])
def test_other_dtypes(variant, dtype):
    p = problem(40, 300, 24, dtype)
    found = run(p, variant=variant)
    check(found, oracle(p), gradient_cap=1e-5 if dtype == torch.float32 else 1e-3)
    assert found[1].dtype == dtype
    assert found[2].dtype == torch.float32


OPTIONS = [
    {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5},
    {"proximal": True, "behaviour_cap": 1.1, "temperature": 0.6},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_with_a_mask(options):
    """Rows that are masked out hold NaN and targets out of range; they cost nothing and come back as 0."""
    p, mask = problem(30, 500, 32), torch.rand(30) < 0.6
    expected = oracle(p, mask=mask, **options)
    p["hidden"][~mask] = torch.nan
    p["sampled"][~mask] = p["advantages"][~mask] = torch.nan
    p["targets"][~mask] = -100
    found = run(p, mask=mask, chunk=16, **options)
    expected[1][~mask] = 0
    check(found, expected, mask)
    assert not found[1][~mask].any() and not found[3][~mask].any() and not found[4][~mask].any()
    totals = dict(zip(FIELDS, found[5].tolist(), strict=True))
    assert totals["tokens"] == int(mask.sum())
    assert totals["entropy_sum"] == pytest.approx(float(expected[4].sum()), rel=1e-5)


@pytest.mark.parametrize("variant", ["fused", "library"])
def test_overflow_of_the_reference(variant):
    """New log-probs far below and far above the sampled ones: powers of two differ between tiles and rows.

    The decoupled objective keeps these rows' gradients alive: its ratio is near 1 whatever sampled them.
    """
    p = problem(32, 1000, 64, scale=12.0)
    logprobs, _ = ops_oracle.logprob(p["hidden"].double() @ p["weight"].double().T, p["targets"])
    p["sampled"] = torch.full((32,), -0.01)
    p["sampled"][:4] = -90.0
    assert float(logprobs.min()) < -40
    # A weight that reaches e^19 would drown the other rows' error in the norm.
    options = {"proximal": True, "behaviour_cap": 1.0}
    found, expected = run(p, variant=variant, **options), oracle(p, **options)
    check(found, expected)
    far = logprobs < -40
    assert ops_oracle.relative(found[1][far], expected[1][far]) <= 4e-3


@pytest.mark.parametrize("variant", ["fused", "library"])
def test_what_all_rows_of_the_head_share_does_not_leak(variant):
    """The exact gradient along the shared direction is 0; rounding each probability alone would give it 0.1."""
    p = problem(24, 600, 32, scale=3.0)
    p["hidden"][:, 0], p["weight"][:, 0] = 0.0, 100.0
    logprobs, _ = ops_oracle.logprob(p["hidden"].double() @ p["weight"].double().T, p["targets"])
    p["sampled"] = (logprobs + 0.1 * torch.randn(24)).clamp(max=0).float()
    found = run(p, variant=variant)
    check(found, oracle(p))
    assert float(found[1][:, 0].abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["all negative", "sixty", "one word", "sure"])
def test_hard_rows(kind):
    p = problem(24, 1001, 32, scale=0.1)
    if kind == "all negative":  # columns past the vocabulary, were they counted, would be the largest
        p["hidden"][:, 0], p["weight"][:, 0] = 8.0, -8.0
    elif kind == "sixty":
        p["hidden"] *= 150
    elif kind == "one word":
        p["targets"][:] = 7
    else:  # p of the target so near 1 that nothing but the others' sum is left of the gradient
        p["weight"][5] = p["hidden"][0] * 3000
        p["hidden"][:] = p["hidden"][:1]
        p["targets"][:] = 5
    logprobs, _ = ops_oracle.logprob(p["hidden"].double() @ p["weight"].double().T, p["targets"])
    p["sampled"] = (logprobs + 0.1 * torch.randn(24)).clamp(max=0).float()
    check(run(p), oracle(p))


def test_chunk_does_not_matter_and_runs_repeat():
    p = problem(30, 300, 32)
    whole, parts = run(p), run(p, chunk=13)
    assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(whole, run(p), strict=True))
    assert torch.equal(whole[1], parts[1]) and torch.equal(whole[3], parts[3]) and torch.equal(whole[5], parts[5])
    assert ops_oracle.relative(parts[2], whole[2].double()) <= 1e-6


def test_no_row_counts():
    p = problem(5, 40, 16)
    loss, grad_hidden, grad_weight, logprobs, _, stats = run(p, mask=torch.zeros(5, dtype=torch.bool))
    assert float(loss) == 0 and not grad_hidden.any() and not grad_weight.any() and not logprobs.any()
    assert stats[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_needed(dtype):
    p = problem(5, 40, 16, dtype)
    args = (p["hidden"], p["weight"], p["targets"], p["sampled"], p["advantages"], None, None, torch.tensor(7.0))
    full = run(p)
    for need in ((True, False), (False, True), (False, False)):
        found = ppo_head.ppo_head(*args, 0.2, 0.2, None, None, 1.0, None, *need)
        for wanted, gradient, other in zip(need, found[1:3], full[1:3], strict=True):
            assert torch.equal(gradient, other) if wanted else gradient is None


@pytest.mark.parametrize("variant", ["fused", "library"])
@pytest.mark.parametrize("spread", [False, True])
def test_head_logprob(variant, spread, monkeypatch):
    monkeypatch.setattr(head, "choose_variant", lambda hidden: variant)
    for name in ("FUSED", "LIBRARY"):
        monkeypatch.setattr(head, name, tiles(variant, 24, 600, 32))
    p = problem(24, 600, 32, shared=6.0)
    hidden, weight = (p[k].double().requires_grad_() for k in ("hidden", "weight"))
    want = ops_oracle.logprob(hidden @ weight.T, p["targets"], 0.8)
    g, h = torch.randn(24), torch.randn(24) if spread else None
    grads = torch.autograd.grad(
        want, (hidden, weight), (g.double(), torch.zeros(24).double() if h is None else h.double())
    )
    logprobs, entropy, logsumexp = head_logprob_forward(p["hidden"], p["weight"], p["targets"], 0.8, 16)
    assert float((logprobs.double() - want[0].detach()).abs().max()) <= 2e-5
    assert float((entropy.double() - want[1].detach()).abs().max()) <= 1e-4
    found = head_logprob_backward(p["hidden"], p["weight"], p["targets"], logsumexp, entropy, g, h, 0.8, 16, True, True)
    for gradient, expected in zip(found, grads, strict=True):
        assert ops_oracle.relative(gradient, expected) <= 4e-3


def test_plans():
    """The tensor copy engine needs rows of a multiple of 16 bytes; scratch is bounded whatever the vocabulary."""
    hidden = torch.zeros(8, 100, dtype=torch.bfloat16)
    assert head.choose_variant(hidden) == "library"
    assert head.choose_variant(torch.zeros(8, 896, dtype=torch.bfloat16)) == "fused"
    assert head.choose_variant(torch.zeros(8, 896)) == "library"
    weight = torch.zeros(1, dtype=torch.bfloat16).expand(10**6, 1)
    rows = head.choose_chunk(10**6, weight, None)
    assert 128 <= rows <= 2**33 // 16 // (2 * 10**6)
    assert head.choose_chunk(5, weight, None) == 5
    assert head.choose_chunk(5, weight, 3) == 3
