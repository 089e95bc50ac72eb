"""pack: what it promises, and that C++ and Python decide alike."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orz_async import ops
from orz_async.ops import backend

pytestmark = pytest.mark.usefixtures("ops_backend")


def long_tailed(count: int, seed: int = 0) -> list[int]:
    """Response lengths as reasoning models have them, with a limit many of them hit."""
    draw = random.Random(seed)
    return [min(8192, max(16, int(draw.lognormvariate(6.5, 1.0)))) for _ in range(count)]


def costs(packed: list[list[list[int]]], lengths: list[int], cost: tuple[float, float]) -> list[float]:
    return [sum(cost[0] * lengths[i] + cost[1] * lengths[i] ** 2 for bin_ in rank for i in bin_) for rank in packed]


def check(packed: list[list[list[int]]], lengths: list[int], max_tokens: int, num_ranks: int) -> None:
    assert len(packed) == num_ranks
    assert len({len(rank) for rank in packed}) == 1
    assert sorted(i for rank in packed for bin_ in rank for i in bin_) == list(range(len(lengths)))
    for rank in packed:
        for bin_ in rank:
            assert sum(lengths[i] for i in bin_) <= max_tokens or len(bin_) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    max_tokens=st.integers(1, 400),
    num_ranks=st.integers(1, 9),
    cost=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.001), (0.3, 0.7)]),
)
def test_every_sequence_once_within_the_budget(lengths, max_tokens, num_ranks, cost) -> None:
    packed = ops.pack(lengths, max_tokens=max_tokens, num_ranks=num_ranks, cost=cost)
    check(packed, lengths, max_tokens, num_ranks)
    # No rank could do with fewer microbatches by joining two of its own.
    for rank in packed:
        sizes = sorted(sum(lengths[i] for i in bin_) for bin_ in rank if bin_)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > max_tokens


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 10_000)), max_size=80),
    num_ranks=st.one_of(st.integers(1, 17), st.just(60)),
    cost=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 1e-4), (0.1, 0.3)]),
)
def test_cpp_and_python_decide_alike(lengths, num_ranks, cost) -> None:
    results = []
    for name in ("reference", "cpu"):
        with backend.using(name):
            results.append(ops.pack(lengths, max_tokens=9000, num_ranks=num_ranks, cost=cost))
    assert results[0] == results[1]


@pytest.mark.parametrize("cost", [(1.0, 0.0), (1.0, 1e-4)])
def test_balance_of_a_full_step(cost: tuple[float, float]) -> None:
    lengths = long_tailed(8192)
    packed = ops.pack(lengths, max_tokens=16384, num_ranks=16, cost=cost)
    check(packed, lengths, 16384, 16)
    per_rank = costs(packed, lengths, cost)
    assert max(per_rank) / (sum(per_rank) / 16) <= 1.01
    if cost == (1.0, 0.0):
        # Of all microbatches that could be needed, at most one more a rank than the tokens alone require.
        assert len(packed[0]) <= -(-sum(lengths) // (16 * 16384)) + 1


def test_few_long_sequences_are_spread() -> None:
    packed = ops.pack([100, 100, 100, 100, 1, 1, 1, 1], max_tokens=1000, num_ranks=4)
    assert sorted(costs(packed, [100, 100, 100, 100, 1, 1, 1, 1], (1.0, 0.0))) == [101.0] * 4


def test_refinement_repairs_what_differencing_leaves() -> None:
    # Karmarkar-Karp alone ends at 16 against 14 on its textbook example; the best split is 15 and 15.
    lengths = [8, 7, 6, 5, 4]
    packed = ops.pack(lengths, max_tokens=100, num_ranks=2)
    assert sorted(costs(packed, lengths, (1.0, 0.0))) == [15.0, 15.0]


def test_corners() -> None:
    assert ops.pack([], max_tokens=5, num_ranks=3) == [[], [], []]
    assert ops.pack([7], max_tokens=5, num_ranks=2) in ([[[0]], [[]]], [[[]], [[0]]])
    assert ops.pack([3, 3], max_tokens=6) == [[[0, 1]]]
    assert ops.pack([3, 4], max_tokens=6) == [[[1], [0]]]
    assert ops.pack([5] * 4, max_tokens=5) == [[[0], [1], [2], [3]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_B": [3, 0]}, "lengths_B: expected positive lengths, found 0"),
        ({"lengths_B": [2**31]}, "lengths_B: expected lengths below"),
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, found 0"),
        ({"num_ranks": 0}, "num_ranks: expected an integer of at least 1, found 0"),
        ({"cost": (-1.0, 0.0)}, r"cost\[0\]: expected a number"),
        ({"cost": (0.0, 0.0)}, "cost: expected at least one positive number"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {"lengths_B": [3, 4], "max_tokens": 8}
    arguments = good | change
    with pytest.raises(ValueError, match=message):
        ops.pack(arguments.pop("lengths_B"), **arguments)
