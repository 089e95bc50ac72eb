"""A small piece of `make fuzz`: mutated frames neither raise nor get past the checks, and cost little memory."""

from __future__ import annotations

from tests.fuzz_wire import Fuzz, largest_allocation


def test_mutated_frames() -> None:
    fuzz = Fuzz(seed=1)
    fuzz.run(10_000)
    fuzz.close()
    assert len(fuzz.switchboard.by_name) <= 1 >= len(fuzz.ledger.peers)
    # The mutations must reach the depths, or this proves nothing.
    assert fuzz.outcomes["rejected"] > 3_000
    assert fuzz.outcomes["refused results"] > 100
    assert fuzz.outcomes["accepted results"] > 100
    assert fuzz.ledger.book.version > 5


def test_a_frame_costs_memory_in_proportion() -> None:
    assert largest_allocation(seed=2, count=1_500) < 1
