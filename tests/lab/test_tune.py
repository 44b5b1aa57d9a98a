"""The search against brute force, and what a tuning does with measured numbers."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest

from hybridkv.errors import UsageError
from hybridkv_lab import knapsack
from hybridkv_lab.corpus import split
from hybridkv_lab.knapsack import Choice, Frontier, Picks, cost_of, loss_of, neighbours, tightened
from hybridkv_lab.measure import Trace
from hybridkv_lab.sensitivity import derive
from hybridkv_lab.tuner import paired

SEEDS = range(25)


def problem(seed: int) -> list[list[Choice]]:
    """Up to five layers of up to five choices; some costs are equal, some losses infinite."""
    rng = random.Random(seed)
    groups = []
    for _ in range(rng.randint(1, 5)):
        group = [Choice(rng.randint(0, 20), rng.choice([rng.random(), rng.random() ** 6, math.inf])) for _ in range(4)]
        groups.append([*group, Choice(rng.randint(0, 40), rng.random())])
    return groups


def every(groups: list[list[Choice]]) -> list[Picks]:
    return [picks for picks in product(*(range(len(g)) for g in groups)) if math.isfinite(loss_of(groups, picks))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_within_a_cost_is_brute_forces(seed: int) -> None:
    groups = problem(seed)
    frontier = Frontier(groups)
    last = math.inf
    for budget in range(0, 120, 3):
        fits = [picks for picks in every(groups) if cost_of(groups, picks) <= budget]
        found = frontier.within_cost(budget)
        if not fits:
            assert found is None
            continue
        assert found is not None
        assert cost_of(groups, found) <= budget
        best = min(loss_of(groups, picks) for picks in fits)
        assert loss_of(groups, found) == pytest.approx(best)
        assert loss_of(groups, found) <= last  # more bytes never lose more
        last = loss_of(groups, found)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_smallest_within_a_loss_is_brute_forces(seed: int) -> None:
    groups = problem(seed)
    frontier = Frontier(groups)
    for limit in (0.0, 0.05, 0.2, 0.7, 1.5, 5.0):
        fits = [picks for picks in every(groups) if loss_of(groups, picks) <= limit]
        found = frontier.within_loss(limit)
        if not fits:
            assert found is None
            continue
        assert found is not None
        assert loss_of(groups, found) <= limit + 1e-12
        assert cost_of(groups, found) == min(cost_of(groups, picks) for picks in fits)


def test_the_frontier_is_one() -> None:
    frontier = Frontier(problem(3))
    assert (np.diff(frontier.costs) > 0).all()
    assert (np.diff(frontier.losses) < 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_frontier_keeps_the_budget_and_loses_little(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    groups = []
    for _ in range(6):  # more bytes always lose less: every combination is on the frontier of its layer
        costs = sorted(rng.randint(1, 10**6) for _ in range(8))
        groups.append([Choice(cost, rng.random() + 1e6 / cost) for cost in costs])
    exact = Frontier(groups)
    monkeypatch.setattr(knapsack, "MAX_POINTS", 64)
    thin = Frontier(groups)
    assert len(thin) <= 64 < len(exact)
    for budget in range(int(exact.costs[0]), int(exact.costs[-1]), 10**5):
        found, nearly = thin.within_cost(budget), exact.within_cost(budget - 6 * (6 * 10**6 // 62))
        assert found is None or cost_of(groups, found) <= budget
        if nearly is not None:  # a step of the thinned range for each layer
            assert found is not None
            assert loss_of(groups, found) <= loss_of(groups, nearly) + 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_the_best_of_two_changes(seed: int) -> None:
    groups = problem(seed)
    start = Frontier(groups).within_cost(60)
    if start is None:
        return
    near = [
        picks
        for picks in every(groups)
        if 1 <= sum(a != b for a, b in zip(picks, start, strict=True)) <= 2 and cost_of(groups, picks) <= 60
    ]
    found = neighbours(groups, start, 60, 5)
    expected = sorted(loss_of(groups, picks) for picks in near)[:5]
    assert [loss_of(groups, picks) for picks in found] == pytest.approx(expected)
    assert len(set(found)) == len(found)
    assert all(picks in near for picks in found)


@pytest.mark.parametrize("off", [0.3, 1.0, 2.5])
def test_a_measured_limit_is_met_by_the_smallest(off: float) -> None:
    """Predictions are off by a factor: what is asked for last is what a search with true losses finds."""
    groups = [[Choice(bits, 4.0**-bits) for bits in range(1, 9)] for _ in range(4)]
    frontier = Frontier(groups)
    asking = tightened(frontier, 1e-2)
    measured: list[tuple[int, float]] = []
    picks = next(asking, None)
    while picks is not None:
        measured.append((cost_of(groups, picks), off * loss_of(groups, picks)))
        try:
            picks = asking.send(measured[-1][1])
        except StopIteration:
            break
    best = frontier.within_loss(1e-2 / off)
    assert best is not None
    assert min(cost for cost, loss in measured if loss <= 1e-2) == cost_of(groups, best)
    assert len(measured) <= 4


TOGETHER = {"a": 1e-4, "b": 1e-3, "c": 1e-2, "d": 1e-1}


class TestDerived:
    def test_in_proportion_from_one(self) -> None:
        assert derive({"b": 2e-5}, TOGETHER, "c") == pytest.approx(2e-4)
        assert derive({"b": 2e-5}, TOGETHER, "a") == pytest.approx(2e-6)

    def test_between_two(self) -> None:
        own = {"a": 1e-6, "c": 1e-3}
        assert derive(own, TOGETHER, "b") == pytest.approx(math.sqrt(1e-6 * 1e-3))
        assert derive(own, TOGETHER, "d") == pytest.approx(1e-2)

    def test_what_is_measured_is_given_back(self) -> None:
        assert derive({"a": 3e-6, "c": 1e-3}, TOGETHER, "a") == pytest.approx(3e-6)

    def test_not_finite(self) -> None:
        assert derive({"a": 1e-6}, {**TOGETHER, "d": math.inf}, "d") == math.inf
        assert derive({"a": math.inf}, TOGETHER, "b") == math.inf


def trace(kld: list[float]) -> Trace:
    numbers = np.array(kld, np.float32)
    return Trace(numbers, numbers, numbers, numbers, numbers, numbers)


def test_a_paired_difference_knows_its_error() -> None:
    """Tokens differ a hundred times more from each other than the candidates do."""
    rng = np.random.default_rng(3)
    base = rng.exponential(1.0, 2000)
    gain, error = paired(trace(list(base + 0.01 + rng.normal(0, 0.01, 2000))), trace(list(base)))
    assert gain == pytest.approx(0.01, abs=1e-3)
    assert error == pytest.approx(0.01 / math.sqrt(2000), rel=0.1)


class TestSplit:
    @pytest.mark.parametrize(("n_first", "n_second"), [(1, 1), (1, 4), (2, 6), (3, 1)])
    def test_parts_share_no_token_and_take_turns(self, n_first: int, n_second: int) -> None:
        first, second = split("x", list(range(1000)), 20, n_first, n_second)
        assert (len(first.windows), len(second.windows)) == (n_first, n_second)
        tokens = [t for corpus in (first, second) for w in corpus.windows for t in w.tolist()]
        assert len(set(tokens)) == len(tokens) == 21 * (n_first + n_second)
        assert max(tokens) >= 1000 * (n_first + n_second - 1) // (n_first + n_second) - 1

    def test_too_short(self) -> None:
        with pytest.raises(UsageError, match="x has 40 tokens; 2 windows of 20 need 42\nhint: take a longer text"):
            split("x", list(range(40)), 20, 1, 1)
