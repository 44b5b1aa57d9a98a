"""The search behind `hybridkv tune`: a cost and a loss per layer and choice in, one choice per layer out.

A multiple-choice knapsack. Losses are taken to add up, which divergences do while they are small, and costs add up by
themselves. `Frontier` holds every combination that no other beats in both, found layer by layer: it is exact, and it
answers all three questions that a user may have (least loss within a cost, least cost within a loss, what a budget
buys). Knows no model; what is measured is `lab.sensitivity`'s business.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 1 << 16
"""Most points of a frontier: beyond, they are thinned, and a solution may miss the best by one 65536th of the costs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a layer.

    Attributes
    ----------
    cost
        Bytes, or whatever is counted; not negative.
    loss
        What it adds to the loss; infinite for a choice that must not be taken.
    """

    cost: int
    loss: float


Groups = Sequence[Sequence[Choice]]
"""For each layer, its choices."""

Picks = tuple[int, ...]
"""For each layer, the index of the choice taken."""


def cost_of(groups: Groups, picks: Picks) -> int:
    """Sum the cost of a combination."""
    return sum(group[i].cost for group, i in zip(groups, picks, strict=True))


def loss_of(groups: Groups, picks: Picks) -> float:
    """Sum the loss of a combination, if losses add up."""
    return sum(group[i].loss for group, i in zip(groups, picks, strict=True))


class Frontier:
    """All combinations that no other beats in cost and loss.

    Parameters
    ----------
    groups
        Choices of each layer; at least one, of finite loss, in each.
    """

    def __init__(self, groups: Groups) -> None:
        self.costs: NDArray[np.int64] = np.zeros(1, np.int64)
        self.losses: NDArray[np.float64] = np.zeros(1)
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for group in groups:
            self._add(group)

    def __len__(self) -> int:
        return len(self.costs)

    def within_cost(self, most: int) -> Picks | None:
        """Find the combination of least loss whose cost is at most `most`; None if there is none."""
        return self._picks(int(np.searchsorted(self.costs, most, side="right")) - 1)

    def within_loss(self, most: float) -> Picks | None:
        """Find the combination of least cost whose loss is at most `most`; None if there is none."""
        fits = np.flatnonzero(self.losses <= most)
        return self._picks(int(fits[0]) if len(fits) else -1)

    def _add(self, group: Sequence[Choice]) -> None:
        cost = np.add.outer(self.costs, np.array([c.cost for c in group], np.int64)).ravel()
        loss = np.add.outer(self.losses, np.array([c.loss for c in group])).ravel()
        order = np.lexsort((loss, cost))  # by cost, and by loss where costs are equal
        sorted_loss = loss[order]
        before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])
        kept = order[sorted_loss < before]
        kept = kept[_thinned(cost[kept])]
        self.costs, self.losses = cost[kept], loss[kept]
        self._steps.append((kept // len(group), kept % len(group)))

    def _picks(self, index: int) -> Picks | None:
        if index < 0:
            return None
        picks: list[int] = []
        for parent, choice in reversed(self._steps):
            picks.append(int(choice[index]))
            index = int(parent[index])
        return tuple(reversed(picks))


def _thinned(costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose at most `MAX_POINTS` indices into ascending costs: the first, and the last of each equal part."""
    if len(costs) <= MAX_POINTS:
        return np.arange(len(costs))
    part = (costs - costs[0]) * (MAX_POINTS - 2) // max(1, int(costs[-1] - costs[0]))
    last = np.flatnonzero(np.append(part[1:] != part[:-1], True))
    return np.unique(np.concatenate([[0], last]))


def neighbours(groups: Groups, picks: Picks, most: int, count: int) -> list[Picks]:
    """List the combinations that differ from `picks` in one or two layers and cost at most `most`, least loss first."""
    moves = [(layer, i) for layer, group in enumerate(groups) for i in range(len(group)) if i != picks[layer]]
    moves = [(layer, i) for layer, i in moves if np.isfinite(groups[layer][i].loss)]
    spare, here = most - cost_of(groups, picks), loss_of(groups, picks)
    cost = np.array([groups[layer][i].cost - groups[layer][picks[layer]].cost for layer, i in moves], np.int64)
    loss = np.array([groups[layer][i].loss - groups[layer][picks[layer]].loss for layer, i in moves])
    layers = np.array([layer for layer, _ in moves], np.int64)
    found: list[tuple[float, tuple[int, ...]]]
    found = [(here + float(loss[m]), (int(m),)) for m in np.flatnonzero(cost <= spare)]
    first, second = np.nonzero((cost[:, None] + cost[None, :] <= spare) & (layers[:, None] < layers[None, :]))
    both = loss[first] + loss[second]
    nearest = np.argsort(both, kind="stable")[:count]
    found += [(here + float(both[p]), (int(first[p]), int(second[p]))) for p in nearest]
    return [_moved(picks, [moves[m] for m in taken]) for _, taken in sorted(found)[:count]]


def _moved(picks: Picks, moves: Sequence[tuple[int, int]]) -> Picks:
    changed = list(picks)
    for layer, i in moves:
        changed[layer] = i
    return tuple(changed)


def tightened(frontier: Frontier, limit: float, n_tries: int = 6) -> Generator[Picks, float, None]:
    """Yield combinations to measure, so that the smallest whose *measured* loss is within `limit` is found.

    A generator: `send` it the measured loss of each. Predictions are scaled by what the last measurement showed them to
    be off by; it ends when it would ask for the same once more.
    """
    asked: set[Picks] = set()
    target = limit
    for _ in range(n_tries):
        picks = frontier.within_loss(max(target, float(frontier.losses[-1])))  # the best there is may measure better
        if picks is None or picks in asked:
            return
        asked.add(picks)
        measured = yield picks
        target *= min(4.0, max(0.1, limit / measured)) if measured else 4.0
