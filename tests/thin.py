"""Fewer cases that find as much: a sample of a product runs by default, the rest of it with `-m slow`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Row = tuple[Any, ...]


def covering(*axes: Iterable[Any]) -> list[Row]:
    """Choose rows of a product in which every pair of values of any two axes occurs."""
    axes = tuple(tuple(values) for values in axes)
    cells = [[(axis, i) for i in range(len(values))] for axis, values in enumerate(axes)]
    left = {pair for one, other in combinations(cells, 2) for pair in product(one, other)}
    rows: list[Row] = []
    while left:
        row = dict(min(left))
        for axis in sorted(set(range(len(axes))) - set(row), key=lambda axis: -len(axes[axis])):
            row[axis] = max(
                range(len(axes[axis])),
                key=lambda i: sum(tuple(sorted(((axis, i), cell))) in left for cell in row.items()),
            )
        left -= set(combinations(sorted(row.items()), 2))
        rows.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return rows


def pairwise(*axes: Iterable[Any]) -> list[Any]:
    """Parametrize by a product: a pairwise sample by default, the rest as slow."""
    return slow_but(product(*axes), covering(*axes))


def each_side(names: Iterable[str]) -> list[Any]:
    """Parametrize by pairs of types: each type twice on either side by default, the other pairs as slow.

    K and V of an attention meet in its softmax alone, where neither has a type any more.
    """
    names = tuple(names)
    n = len(names)
    quick = [(names[i], names[(i + shift) % n]) for shift in (1, n // 2) for i in range(n)]
    return slow_but(product(names, names), quick)


def slow_but(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Parametrize by values, of which only some run by default."""
    values, quick = list(values), list(quick)
    assert all(value in values for value in quick), quick
    return [_param(value, () if value in quick else pytest.mark.slow) for value in values]


def _param(value: Any, marks: Any) -> Any:
    row = value if isinstance(value, tuple) else (value,)
    return pytest.param(*row, marks=marks, id="-".join(map(str, row)))
