"""Each way in which a well-formed trajectory can be wrong is refused, and says so."""

from __future__ import annotations

import math

import msgspec
import pytest

from orz_async.broker.messages import LeaseRef, Progress, Status
from orz_async.broker.validate import problem_of, problem_of_status
from orz_async.records import Lease, Sampling, Span, Trajectory, float32_bytes, int32_bytes

LEASE = Lease("train", 7, 1, "p", int32_bytes([1, 2]), "42", 3, 99, 4, Sampling(1.0, 4))
GOOD = Trajectory(
    kind="train",
    rollout=7,
    attempt=1,
    prompt_id="p",
    sample=3,
    prompt=int32_bytes([1, 2]),
    response=int32_bytes([0, 49, 5]),
    logprobs=float32_bytes([-0.5, -80.0, 0.0]),
    spans=(Span(4, 0), Span(6, 2)),
    reward=1.0,
    finish="stop",
    verdict="correct",
    generator="a",
    generate_s=0.0,
)


def problem(**changes: object) -> str | None:
    trajectory = msgspec.structs.replace(GOOD, **changes)
    return problem_of(trajectory, LEASE, generator="a", vocab_size=50, published=6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spans": (Span(5, 0),)},
        {"logprobs": float32_bytes([1e-6, -1, -1])},  # above zero by rounding
        {"finish": "length", "response": int32_bytes([1] * 4), "logprobs": float32_bytes([-1.0] * 4)},
        {"reward": -1.0},
    ],
)
def test_good(changes: dict[str, object]) -> None:
    assert problem(**changes) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "eval"}, "kind differs"),
        ({"rollout": 8}, "rollout differs"),
        ({"attempt": 0}, "attempt differs"),
        ({"prompt_id": "q"}, "prompt_id differs"),
        ({"sample": 2}, "sample differs"),
        ({"prompt": int32_bytes([1, 3])}, "prompt differs"),
        ({"generator": "b"}, "produced by 'b'"),
        ({"response": b""}, "positive multiple of 4"),
        ({"response": b"12345"}, "positive multiple of 4"),
        ({"logprobs": float32_bytes([-1.0])}, "logprobs have 4 bytes"),
        ({"response": int32_bytes([1] * 5), "logprobs": float32_bytes([-1.0] * 5)}, "the lease allows 4"),
        ({"finish": "length"}, "finish is length after 3"),
        ({"response": int32_bytes([0, 50, 5])}, "vocabulary has 50"),
        ({"response": int32_bytes([0, -1, 5])}, "ids from -1"),
        ({"logprobs": float32_bytes([-1, math.nan, -1])}, "not finite"),
        ({"logprobs": float32_bytes([-1, -math.inf, -1])}, "not finite"),
        ({"logprobs": float32_bytes([-1, math.inf, -1])}, "not finite"),
        ({"logprobs": float32_bytes([-1, 0.5, -1])}, "above 0"),
        ({"spans": ()}, "do not begin at token 0"),
        ({"spans": (Span(4, 1),)}, "do not begin at token 0"),
        ({"spans": (Span(4, 0), Span(5, 0))}, "do not increase"),
        ({"spans": (Span(5, 0), Span(5, 1))}, "do not increase"),
        ({"spans": (Span(6, 0), Span(5, 1))}, "do not increase"),
        ({"spans": (Span(4, 0), Span(5, 3))}, "begins at token 3 of 3"),
        ({"spans": (Span(3, 0),)}, "floor is 4"),
        ({"spans": (Span(4, 0), Span(7, 1))}, "published is 6"),
        ({"reward": math.nan}, "reward nan"),
        ({"reward": 1.5}, "reward 1.5"),
        ({"verdict": ""}, "verdict"),
        ({"verdict": "x" * 65}, "verdict"),
        ({"verdict": "a\nb"}, "verdict"),
        ({"generate_s": -1.0}, "generate_s"),
        ({"generate_s": math.inf}, "generate_s"),
    ],
)
def test_refused(changes: dict[str, object], words: str) -> None:
    found = problem(**changes)
    assert found is not None and words in found


REF = LeaseRef("train", 7, 1)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(0, -1, ()), None),
        (Status(8192, 6, (Progress(REF, 4, False), Progress(REF, 0, True))), None),
        (Status(-1, 6, ()), "-1 slots"),
        (Status(8193, 6, ()), "8193 slots"),
        (Status(8, -2, ()), "serves version -2"),
        (Status(8, 7, ()), "newest one published is 6"),
        (Status(8, 6, (Progress(REF, 5, False),)), "5 tokens of one lease, it allows 4"),
        (Status(8, 6, (Progress(REF, -1, False),)), "-1 tokens"),
        (Status(8, 6, (Progress(REF, 0, True),) * 8193), "progress of 8193 leases"),
    ],
)
def test_a_status_claims_what_is_possible(status: Status, words: str | None) -> None:
    found = problem_of_status(status, published=6, longest=4)
    assert found is None if words is None else found is not None and words in found
