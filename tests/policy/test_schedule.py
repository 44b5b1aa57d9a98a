"""When a layer is checked again: calls of several tokens and of one."""

from __future__ import annotations

import pytest

from hybridkv.policy import Schedule


def checked(*calls: int) -> list[int]:
    """Tokens seen after each of these calls that was due."""
    schedule, n_seen, due = Schedule(), 0, []
    for n_new in calls:
        n_seen += n_new
        if schedule.due(n_seen, n_new):
            due.append(n_seen)
            schedule = schedule.checked(n_seen, n_new)
    return due


def test_a_prompt_in_chunks_is_checked_where_it_doubles() -> None:
    assert checked(*[512] * 16) == [512, 1024, 2048, 4096, 8192]
    assert checked(64, 63, 1136) == [64, 1263]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (40, [40, 41, 64, 65, 129, 257]),  # rows 40, 63 and 64, 128, 256
        (31, [31, 32, 33, 65, 129, 257]),
        (64, [64, 65, 96, 129, 257]),  # row 64 is the first, and a block's first
        (2, [2, 3, 32, 33, 65, 129, 257]),
    ],
)
def test_single_tokens(prompt: int, expected: list[int]) -> None:
    assert checked(prompt, *[1] * (300 - prompt)) == expected


def test_the_number_of_checks_grows_with_the_logarithm() -> None:
    assert len(checked(100, *[1] * 100_000)) <= 15
