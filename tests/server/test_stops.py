"""Stop strings: however a text is cut into pieces, what comes out is what a search of the whole gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridkv.server.stops import StopStrings

LETTERS = st.text("ab\u00e9", max_size=12)


def passed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    filter_ = StopStrings(stops)
    said = "".join(filter_.push(piece) for piece in pieces)
    return said + filter_.close(), filter_.found


def searched(stops: list[str], text: str) -> tuple[str, bool]:
    """The oracle: read one character at a time and look at the end of what was read."""
    for end in range(len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(st.lists(LETTERS.filter(bool), max_size=4), st.lists(LETTERS, max_size=6))
def test_pieces_make_no_difference(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert passed(stops, pieces) == passed(stops, list(text)) == searched(stops, text)


def test_text_is_withheld_only_while_it_may_become_a_stop_string() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("Hello") == "Hello"
    assert stops.push("\n") == ""
    assert stops.push("x") == "\nx"
    assert [stops.push(piece) for piece in ("!\n\n", "Us", "er", ": and more")] == ["!", "", "", ""]
    assert stops.found
    assert stops.push("never") == stops.close() == ""
