"""Debt and credit, and the flood that they stop."""

from __future__ import annotations

from orz_async.broker.standing import FREE_DEBT, MAX_DEBT, MAX_OWNERS, Standing, Standings


def test_a_restart_costs_nothing() -> None:
    standing = Standing()
    for _ in range(FREE_DEBT):
        standing.waste(100.0)
    assert standing.credit(128, 100.0) == 128


def test_wasted_leases_shrink_the_credit_and_results_and_time_restore_it() -> None:
    standing = Standing()
    for _ in range(FREE_DEBT + 100):
        standing.waste(0.0)
    assert standing.credit(128, 0.0) == 28
    assert standing.credit(128, 30.0) == 58
    for _ in range(20):
        standing.earn(30.0)
    assert standing.credit(128, 30.0) == 98
    assert standing.credit(128, 1000.0) == 128


def test_the_debt_is_bounded_and_so_is_the_wait() -> None:
    standing = Standing()
    for _ in range(10 * MAX_DEBT):
        standing.waste(0.0)
    assert standing.credit(1000, 0.0) == 0
    assert standing.credit(1000, float(MAX_DEBT)) == 1000


def test_rejections_are_forgiven_by_results() -> None:
    standing = Standing(rejections=1)
    standing.earn(0.0)
    standing.earn(0.0)
    assert standing.rejections == 0


def test_invented_names_take_bounded_memory() -> None:
    standings = Standings()
    standings["first"].refused = "no"
    for number in range(MAX_OWNERS + 5):
        standings[f"n{number}"].waste(0.0)
    assert len(standings._by_owner) == MAX_OWNERS
    assert standings["first"].refused == ""
