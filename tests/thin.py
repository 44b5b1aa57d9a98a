"""Fewer cases that find as much: a sample of a product runs by default, the rest of it with `-m slow` or `-m long`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Row = tuple[Any, ...]


def covering(*axes: Iterable[Any]) -> list[Row]:
    """Choose rows of a product in which every pair of values of any two axes occurs."""
    axes = tuple(tuple(values) for values in axes)
    if not all(axes):
        return []
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
    """Parametrize by a product: a pairwise sample by default, a sixth of the rest as slow, the others as long.

    What the sample leaves out can only find a fault that takes three values to show.
    """
    axes = tuple(tuple(values) for values in axes)
    quick, found, n_rest = covering(*axes), [], 0
    for row in product(*axes):
        is_rest = row not in quick
        n_rest += is_rest
        marks = () if not is_rest else pytest.mark.slow if n_rest % 6 == 0 else pytest.mark.long
        found.append(_param(row, marks))
    return found


def each_side(names: Iterable[str]) -> list[Any]:
    """Parametrize by pairs of types: each type twice on either side by default, a third of the others as slow.

    K and V of an attention meet in its softmax alone, where neither has a type any more.
    """
    names = tuple(names)
    return mostly_long(product(names, names), [*pairs_in_turn(names), *pairs_in_turn(names, len(names) // 2)])


def pairs_in_turn(names: Iterable[str], shift: int = 1) -> list[tuple[str, str]]:
    """Pair each name with the one that stands `shift` behind it: each is once on either side."""
    names = tuple(names)
    return [(name, names[(i + shift) % len(names)]) for i, name in enumerate(names)]


def every_other(one: Iterable[Any], other: Iterable[Any], step: int = 2) -> list[Any]:
    """Parametrize by a product of two axes: half of it by default, as a chessboard has it, the other half as slow.

    A larger `step` leaves fewer by default; every value of an axis stays if the other has `step` values or more.
    """
    one, other = list(one), list(other)
    quick = [(a, b) for i, a in enumerate(one) for j, b in enumerate(other) if (i + j) % step == 0]
    return slow_but(product(one, other), quick)


def slow_but(values: Iterable[Any], quick: Iterable[Any], long: Iterable[Any] = ()) -> list[Any]:
    """Parametrize by values, of which only some run by default, and some only by hand."""
    values, quick, long = list(values), list(quick), list(long)
    assert all(value in values for value in quick + long), (quick, long)
    return [
        _param(value, () if value in quick else pytest.mark.long if value in long else pytest.mark.slow)
        for value in values
    ]


def mostly_long(values: Iterable[Any], quick: Iterable[Any], step: int = 3) -> list[Any]:
    """Parametrize by values, of which some run by default, one in `step` of the others as slow, the rest as long."""
    values, quick = list(values), list(quick)
    rest = [value for value in values if value not in quick]
    return slow_but(values, quick, [value for i, value in enumerate(rest) if i % step])


def _param(value: Any, marks: Any) -> Any:
    row = value if isinstance(value, tuple) else (value,)
    return pytest.param(*row, marks=marks, id="-".join(map(_id, row)))


def _id(value: Any) -> str:
    return str(getattr(value, "name", getattr(value, "label", value)))
