"""A sample that leaves a pair out would leave a bug in."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from hybridkv.formats import FORMATS
from tests.thin import covering, each_side, every_other, pairwise

AXES = [(range(3), "ab", (True, False)), (range(7), range(5), range(4), range(2)), ("abc",), ((1,), (2, 3))]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_every_pair_of_values_occurs(axes: tuple[object, ...]) -> None:
    rows = covering(*axes)  # type: ignore[arg-type]
    values = [tuple(axis) for axis in axes]  # type: ignore[call-overload]
    assert set(rows) <= set(product(*values))
    for one, other in combinations(range(len(values)), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(values[one], values[other]))


def test_a_sample_is_small() -> None:
    """Not far above the product of the two longest axes, which no sample can be below."""
    assert len(covering(range(7), range(5), range(4), range(3))) <= 40


def test_what_is_not_quick_is_slow_or_long() -> None:
    params = pairwise("abcd", range(4), range(4))
    assert len(params) == 64
    quick = [param.values for param in params if not param.marks]
    assert quick == [row for row in product("abcd", range(4), range(4)) if row in covering("abcd", range(4), range(4))]
    assert len(quick) < 24
    rest = [param.marks[0].name for param in params if param.marks]
    assert rest.count("slow") == len(rest) // 6
    assert rest.count("long") == len(rest) - len(rest) // 6


def test_each_type_is_on_each_side() -> None:
    quick = [param.values for param in each_side(FORMATS) if not param.marks]
    assert len(quick) == 2 * len(FORMATS)
    for side in (0, 1):
        assert {pair[side] for pair in quick} == set(FORMATS)


def test_every_other_leaves_no_value_out() -> None:
    quick = [param.values for param in every_other(range(4), "abc") if not param.marks]
    assert len(quick) == 6
    assert {row[0] for row in quick} == set(range(4))
    assert {row[1] for row in quick} == set("abc")


def test_a_larger_step_leaves_no_value_out() -> None:
    quick = [param.values for param in every_other(range(5), "abc", 3) if not param.marks]
    assert len(quick) == 5
    assert {row[1] for row in quick} == set("abc")
