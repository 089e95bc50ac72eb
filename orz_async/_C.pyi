"""The C++ core (csrc/): plain buffers in and out, no torch. Every function releases the GIL while it works."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview | NDArray[Any]

def crc32c(data: Buffer, init: int = 0) -> int:
    """CRC-32C of `data`, continued from `init`, the CRC of what came before."""

def gae(
    rewards: Buffer,
    values: Buffer,
    cu_seqlens: Buffer,
    gamma: float,
    lam: float,
    mask: Buffer | None,
    bootstrap: Buffer | None,
    advantages: Buffer,
    returns: Buffer,
) -> None:
    """float32 [N] buffers, int32 cu_seqlens [B + 1], bool mask [N], float32 bootstrap [B]; fills the last two."""

def pack(lengths: Buffer, max_tokens: int, num_ranks: int, cost: tuple[float, float]) -> list[list[list[int]]]:
    """As orz_async.ops.pack, of int64 lengths."""

def delta_encode(new: Buffer, old: Buffer, word_bytes: int, threads: int) -> bytes:
    """What turns `old` into `new`, words of 2 or 4 bytes; the layout is in orz_async/ops/reference/delta.py."""

def delta_apply(words: Buffer, payload: Buffer, word_bytes: int, threads: int) -> None:
    """In place; raises ValueError and leaves `words` as they were if the payload does not fit them."""

def softmax_forward(
    logits: Buffer,
    targets: Buffer,
    scale: float,
    exp: Buffer | None,
    logprobs: Buffer,
    entropy: Buffer,
    logsumexp: Buffer,
    total: Buffer,
    threads: int,
) -> None:
    """float32 logits [N, V], int64 targets [N], scale = 1 / temperature; fills the float32 [N] buffers, and `exp`
    (which may be `logits`) with exp(logits * scale - their maximum), whose sums are `total`."""

def softmax_backward(
    logits: Buffer,
    targets: Buffer,
    scale: float,
    logsumexp: Buffer,
    entropy: Buffer,
    grad_logprobs: Buffer,
    grad_entropy: Buffer | None,
    grad_logits: Buffer,
    threads: int,
) -> None:
    """Fills `grad_logits`, which may be `logits`."""

def policy_loss(
    logprobs: Buffer,
    sampled: Buffer,
    advantages: Buffer,
    proximal: Buffer | None,
    entropy: Buffer | None,
    mask: Buffer | None,
    denominator: Buffer,
    lowest: float,
    highest: float,
    dual: float,
    cap: float,
    slopes: Buffer,
    stats: Buffer,
) -> None:
    """float32 [N], a bool mask, `denominator` [1] or [N], the bounds of the ratio (infinity for none); fills `slopes`,
    the derivatives, and `stats`, float64, in the order of ops.stats.PPO_FIELDS."""

def value_loss(
    values: Buffer,
    old_values: Buffer,
    returns: Buffer,
    mask: Buffer | None,
    denominator: Buffer,
    clip: float,
    slopes: Buffer,
    stats: Buffer,
) -> None:
    """As policy_loss; `stats` in the order of ops.stats.VALUE_FIELDS."""

def attend_slots(
    query: Buffer,
    key: Buffer,
    value: Buffer,
    keys: Buffer,
    values: Buffer,
    positions: Buffer,
    kv_heads: int,
    dim: int,
    max_tokens: int,
    scale: float,
    window: int,
    out: Buffer,
    threads: int,
) -> None:
    """As ops.attend_slots: float32 [R, heads, dim], [R, kv_heads, dim] twice, the cache [slots, kv_heads, max_tokens,
    dim] twice, int64 positions [R]; window 0: none. Fills `out`, shaped as `query`, and writes into the cache."""

def attend_packed_forward(
    query: Buffer,
    key: Buffer,
    value: Buffer,
    rows: Buffer,
    ends: Buffer,
    owned: Buffer,
    kv_heads: int,
    dim: int,
    scale: float,
    window: int,
    out: Buffer,
    logsumexp: Buffer,
    threads: int,
) -> None:
    """As ops.attend_packed: float32 [N, heads, dim], [N, kv_heads, dim] twice; int64 `rows` [places], `ends` [B + 1],
    `owned` [B]; window 0: none. Fills `out`, shaped as `query`, and `logsumexp`, float64 [N, heads]."""

def attend_packed_backward(
    query: Buffer,
    key: Buffer,
    value: Buffer,
    rows: Buffer,
    ends: Buffer,
    owned: Buffer,
    kv_heads: int,
    dim: int,
    scale: float,
    window: int,
    out: Buffer,
    logsumexp: Buffer,
    grad_out: Buffer,
    grad_query: Buffer,
    grad_key: Buffer,
    grad_value: Buffer,
    threads: int,
) -> None:
    """Fills `grad_query` and adds to `grad_key` and `grad_value`, which the caller has set to 0."""

def rms_norm_forward(x: Buffer, weight: Buffer, eps: float, out: Buffer, inverse: Buffer, threads: int) -> None:
    """float32 [rows, dim] and [dim]; fills `out`, shaped as `x`, and `inverse` [rows], which backward needs."""

def rms_norm_backward(
    x: Buffer,
    weight: Buffer,
    inverse: Buffer,
    grad_out: Buffer,
    grad_x: Buffer,
    grad_weight: Buffer,
    threads: int,
) -> None:
    """Fills `grad_x` and `grad_weight`."""

def silu_mul_forward(gate: Buffer, up: Buffer, out: Buffer, threads: int) -> None:
    """float32 vectors of one length; fills `out`."""

def silu_mul_backward(
    gate: Buffer, up: Buffer, grad_out: Buffer, grad_gate: Buffer, grad_up: Buffer, threads: int
) -> None:
    """Fills `grad_gate` and `grad_up`."""

def sample(
    logits: Buffer, temperatures: Buffer, uniforms: Buffer, tokens: Buffer, logprobs: Buffer, threads: int
) -> None:
    """As ops.sample: float32 logits [R, V], float32 temperatures [R], float64 uniforms [R]; fills int64 tokens [R] and
    float32 logprobs [R]."""

class Decoder:
    """As ops.Decoder, with a packed copy of the weights.

    `shape` is vocabulary, width, heads, kv_heads, head_dim, width of the MLP, positions. A layer is (attention_norm,
    qkv, query_norm | None, key_norm | None, out, mlp_norm, gate_up, down, window), a linear map (weight, bias | None);
    window 0: none. All float32.
    """

    def __init__(
        self,
        shape: Sequence[int],
        eps: float,
        scale: float,
        embedding: Buffer,
        cos: Buffer,
        sin: Buffer,
        layers: Sequence[tuple[Any, ...]],
        norm: Buffer,
        head: tuple[Buffer, Buffer | None],
    ) -> None: ...
    def step(
        self,
        tokens: Buffer,
        starts: Buffer,
        slots: Buffer,
        positions: Buffer,
        caches: Sequence[tuple[Buffer, Buffer]],
        max_tokens: int,
        logits: Buffer,
        threads: int,
    ) -> None:
        """int64 [N], [S + 1], [S], [S]; float32 caches [slots, kv_heads, max_tokens, head_dim], written in place;
        fills `logits` [S, vocabulary]."""

def features() -> list[str]:
    """Instruction sets this build uses on this machine."""
