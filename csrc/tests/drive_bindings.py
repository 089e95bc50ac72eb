"""Calls every function of a sanitized _C, good and bad arguments alike. Run by csrc/sanitize.sh; needs only numpy."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(call: Any, *arguments: Any) -> None:
    try:
        call(*arguments)
    except (ValueError, BufferError, TypeError):
        return
    raise AssertionError(f"{call.__name__} took {arguments}")


def decoder(core: Any) -> None:
    """Three sequences of a network of one layer: 11 tokens, width 8, two heads of 4 over one, 6 wide inside."""

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    parts = (zeros(8), (zeros(16, 8), zeros(16)), zeros(4), None, (zeros(8, 8), None), zeros(8), (zeros(12, 8), None))
    layer = (*parts, (zeros(8, 6), zeros(8)), 3)
    sizes, table = (11, 8, 2, 1, 4, 6, 20), zeros(20, 4)
    rest = (zeros(8), (zeros(11, 8), np.ones(11, np.float32)))
    made = core.Decoder(sizes, 1e-6, 0.5, zeros(11, 8), table, table, [layer], *rest)
    refused(core.Decoder, (11, 8, 2, 1, 4, 6, 0), 1e-6, 0.5, zeros(11, 8), table, table, [layer], *rest)
    refused(core.Decoder, sizes[:6], 1e-6, 0.5, zeros(11, 8), table, table, [layer], *rest)
    refused(core.Decoder, (11, 8, 3, 2, 4, 6, 20), 1e-6, 0.5, zeros(11, 8), table, table, [layer], *rest)
    refused(core.Decoder, sizes, 1e-6, 0.5, zeros(10, 8), table, table, [layer], *rest)
    refused(core.Decoder, sizes, 1e-6, 0.5, zeros(11, 8), table, table, [layer[:8]], *rest)
    refused(core.Decoder, sizes, 1e-6, 0.5, zeros(11, 8), table, table, [(*layer[:8], -1)], *rest)

    tokens, starts, slots, places = (
        np.array([0, 10, 3, 4, 5]),
        np.array([0, 1, 2, 5]),
        np.array([0, 4, 2]),
        np.zeros(3, int),
    )
    caches, logits = [(zeros(5, 1, 16, 4), zeros(5, 1, 16, 4))], zeros(3, 11)
    made.step(tokens, starts, slots, places + 13, caches, 16, logits, 2)
    assert (logits == 1).all()
    made.step(tokens[:0], starts[:1], slots[:0], places[:0], caches, 16, logits[:0], 1)
    bad = (
        (tokens + 1, starts, slots, places, caches, 16, logits),
        (tokens - 1, starts, slots, places, caches, 16, logits),
        (tokens[:4], starts, slots, places, caches, 16, logits),
        (tokens, starts[[0, 2, 1, 3]], slots, places, caches, 16, logits),
        (tokens, starts[:3], slots, places, caches, 16, logits),
        (tokens, starts, slots * 0, places, caches, 16, logits),
        (tokens, starts, slots + 1, places, caches, 16, logits),
        (tokens, starts, slots - 1, places, caches, 16, logits),
        (tokens, starts, slots, places + 14, caches, 16, logits),
        (tokens, starts, slots, places - 1, caches, 16, logits),
        (tokens, starts, slots, places, [], 16, logits),
        (tokens, starts, slots, places, [(caches[0][0], caches[0][1][:4])], 16, logits),
        (tokens, starts, slots, places, caches, 0, logits),
        (tokens, starts, slots, places, caches, 16, logits[:2]),
    )
    for arguments in bad:
        refused(made.step, *arguments, 1)


def main(path: str) -> None:
    core = load(path)
    draw = np.random.default_rng(0)
    assert core.crc32c(b"123456789") == 0xE3069283
    assert core.crc32c(draw.bytes(50_000)) > 0
    refused(core.crc32c, "text")

    x, cu = draw.standard_normal(100, dtype=np.float32), np.array([0, 60, 100], np.int32)
    out = np.empty((2, 100), np.float32)
    core.gae(x, x, cu, 0.9, 0.9, None, None, out[0], out[1])
    core.gae(x, x, cu, 0.9, 0.9, x > 0, np.ones(2, np.float32), out[0], out[1])
    refused(core.gae, x[:99], x, cu, 0.9, 0.9, None, None, out[0], out[1])
    refused(core.gae, x, x, cu[:2], 0.9, 0.9, None, None, out[0], out[1])
    refused(core.gae, x, x, cu, 0.9, 0.9, None, None, bytes(400), out[1])

    lengths = np.array([3, 4, 5])
    packed = core.pack(lengths, 8, 2, (1.0, 0.0))
    assert sorted(i for rank in packed for microbatch in rank for i in microbatch) == [0, 1, 2]
    refused(core.pack, lengths, 0, 1, (1.0, 0.0))
    refused(core.pack, lengths, 5, 0, (1.0, 0.0))
    refused(core.pack, bytes(9), 5, 1, (1.0, 0.0))

    slopes, sums, one = np.empty(100, np.float32), np.empty(15), np.ones(1, np.float32)
    core.policy_loss(x, x, x, None, None, None, one, 0.8, 1.2, np.inf, np.inf, slopes, sums)
    core.policy_loss(x, x, x, x, x, x > 0, x, 0.8, 1.2, 3.0, 1.5, slopes, sums)
    refused(core.policy_loss, x, x[1:], x, None, None, None, one, 0.8, 1.2, np.inf, np.inf, slopes, sums)
    refused(core.policy_loss, x, x, x, None, None, None, x[:2], 0.8, 1.2, np.inf, np.inf, slopes, sums)
    refused(core.policy_loss, x, x, x, None, None, None, one, 0.8, 1.2, np.inf, np.inf, slopes, sums[:14])
    core.value_loss(x, x, x, x > 0, x, 0.2, slopes, sums[:8])
    refused(core.value_loss, x, x, x, None, one, 0.2, slopes, sums)

    z, targets = draw.standard_normal((5, 77), dtype=np.float32), draw.integers(0, 77, 5)
    rows = np.empty((4, 5), np.float32)
    core.softmax_forward(z, targets, 1.0, np.empty_like(z), *rows, 2)
    core.softmax_backward(z, targets, 1.0, rows[2], rows[1], rows[0], None, z, 2)
    refused(core.softmax_forward, z, targets + 77, 1.0, None, *rows, 1)
    refused(core.softmax_forward, z, targets[:4], 1.0, None, *rows, 1)

    old = draw.integers(0, 2**16, 200_000, dtype=np.uint16)
    new = old ^ (draw.random(200_000) < 0.02).astype(np.uint16)
    payload = core.delta_encode(new, old, 2, 2)
    words = old.copy()
    core.delta_apply(words, payload, 2, 2)
    assert (words == new).all()
    refused(core.delta_apply, words, payload, 2, 2)
    refused(core.delta_apply, old[:99].copy(), payload, 2, 2)
    refused(core.delta_apply, old, payload[:-1], 2, 1)
    refused(core.delta_encode, new, old[:-1], 2, 1)
    refused(core.delta_encode, new, old, 3, 1)
    q, k, cache = np.ones((3, 4, 8), np.float32), np.ones((3, 2, 8), np.float32), np.ones((5, 2, 16, 8), np.float32)
    at, out = np.array([0, 15, 7]), np.empty_like(q)
    core.attend_slots(q, k, k, cache, cache.copy(), at, 2, 8, 16, 0.5, 0, out, 2)
    assert (out == 1).all()
    refused(core.attend_slots, q, k, k, cache, cache, at + 1, 2, 8, 16, 0.5, 0, out, 1)
    refused(core.attend_slots, q, k, k, cache, cache, at - 1, 2, 8, 16, 0.5, 0, out, 1)
    refused(core.attend_slots, q, k, k, cache[:2], cache[:2], at, 2, 8, 16, 0.5, 0, out, 1)
    refused(core.attend_slots, q, k, k, cache, cache[1:], at, 2, 8, 16, 0.5, 0, out, 1)
    refused(core.attend_slots, q, k[1:], k, cache, cache, at, 2, 8, 16, 0.5, 0, out, 1)
    refused(core.attend_slots, q, k, k, cache, cache, at, 2, 8, 0, 0.5, 0, out, 1)
    f32 = np.float32
    rows, ends, owned = np.array([0, 1, 0, 2]), np.array([0, 2, 4]), np.array([0, 1])
    q, k, out, sums = np.ones((3, 4, 8), f32), np.ones((3, 2, 8), f32), np.zeros((3, 4, 8), f32), np.zeros((3, 4))
    packed, tail = (q, k, k, rows, ends, owned, 2, 8, 0.5, 0), (out, sums, 2)
    core.attend_packed_forward(*packed, *tail)
    assert (out == 1).all()
    grads = np.zeros_like(q), np.zeros_like(k), np.zeros_like(k)
    core.attend_packed_backward(*packed, out, sums, np.ones_like(q), *grads, 2)
    assert np.allclose(grads[2].sum(0), 6)
    wrong_ends = ends + 1, ends[::-1].copy()
    for index, wrong in (
        *((3, rows + 1), (3, rows - 1), (5, owned + 2), (5, owned - 1)),
        *((4, wrong) for wrong in wrong_ends),
    ):
        bad = (*packed[:index], wrong, *packed[index + 1 :])
        refused(core.attend_packed_forward, *bad, *tail)
        refused(core.attend_packed_backward, *bad, out, sums, q, *grads, 2)
    refused(core.attend_packed_forward, q[:2], *packed[1:], *tail)
    refused(core.attend_packed_forward, *packed, out[:2], sums, 2)
    refused(core.attend_packed_forward, *packed, out, sums[:2], 2)
    x, weight, inverse = np.ones((700, 5), f32), np.ones(5, f32), np.empty(700, f32)
    made = np.empty_like(x)
    core.rms_norm_forward(x, weight, 0.0, made, inverse, 3)
    assert np.allclose(made, 1) and np.allclose(inverse, 1)
    core.rms_norm_backward(x, weight, inverse, x, made, weight.copy(), 3)
    assert np.allclose(made, 0, atol=1e-6)
    refused(core.rms_norm_forward, x, weight[:0], 0.0, made, inverse, 1)
    refused(core.rms_norm_forward, x, weight, 0.0, made[1:], inverse, 1)
    refused(core.rms_norm_backward, x, weight, inverse[1:], x, made, weight, 1)
    core.silu_mul_forward(x, x, made, 2)
    core.silu_mul_backward(x, x, x, made, np.empty_like(x), 2)
    refused(core.silu_mul_forward, x, x[1:], made, 1)
    refused(core.silu_mul_backward, x, x, x, made[1:], made, 1)

    probs = draw.standard_normal((6, 9), dtype=np.float32)
    warm, uniforms, chosen, said = (
        np.ones(6, np.float32),
        draw.random(6),
        np.empty(6, np.int64),
        np.empty(6, np.float32),
    )
    core.sample(probs, warm, uniforms, chosen, said, 2)
    assert ((chosen >= 0) & (chosen < 9)).all() and (said < 0).all()
    refused(core.sample, probs[:5], warm, uniforms, chosen, said, 1)
    refused(core.sample, probs, warm, uniforms[:5], chosen, said, 1)
    refused(core.sample, probs, warm, uniforms, chosen, said, 0)
    refused(core.sample, probs[:, :0], warm, uniforms, chosen, said, 1)
    decoder(core)
    print("csrc/tests: bindings passed", core.features())


if __name__ == "__main__":
    main(sys.argv[1])
