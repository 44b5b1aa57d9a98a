"""Texts that tokenizers trip over."""

from __future__ import annotations

from hypothesis import strategies as st

COMBINING_MARKS = "नमस्ते दुनिया, வணக்கம்"

ODD = (
    "",
    " ",
    "   \n\n  \t x",
    "a\r\nb\r\n\r\n  c",
    "I'll we'RE they'd can't IT'S",
    "1234567 12.5e-3 x1y22z333",
    "naïve café — “quotes” … ½ ² Ⅷ",
    COMBINING_MARKS,
    "中文字符和日本語テキスト",
    "emoji 👩‍👩‍👧 🇩🇪 ✨",
    "/* a */ x+=y**2; //end\n\tif (a&&b) {",
    "CamelCaseAndUPPERCase lower",
    "nul \0 and \x7f",
    "trailing   ",
)

RUNS = tuple(character * n for character in "a-= \n\t0é" for n in (2, 3, 5, 8, 17, 33, 70))
"""One character over and over: where equal merges overlap, which is first shows."""

_PIECES = st.sampled_from(
    [
        *"ab -=\n\t_*#.,'012xéñ中日한ابना🙂",
        "  ",
        "\r\n",
        "\u200b",
        "\x01",
        "\u0301",
        "👩‍👩‍👧",
        "the",
        " The",
        "ing",
        "<b>",
        "▁",
    ]
)
any_text = st.one_of(
    st.text(max_size=60),
    st.lists(st.tuples(_PIECES, st.integers(1, 7)).map(lambda run: run[0] * run[1]), max_size=40).map("".join),
)
"""Any Unicode at all, and runs of pieces that vocabularies know."""
