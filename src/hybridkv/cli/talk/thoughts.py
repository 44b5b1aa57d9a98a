"""Tell a model's thoughts from its answer, as the text comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Kind = Literal["thought", "answer"]

PAIRS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""Words around thoughts. Source: chat templates of Qwen3, Magistral and Seed-OSS; llama.cpp, common/chat.cpp."""


class Thoughts:
    """Splits the text of one answer.

    Thoughts stand at its beginning alone. A word that is split over two chunks is held back until it is whole.

    Parameters
    ----------
    prompt
        What the answer follows: templates may open thoughts themselves.
    """

    def __init__(self, prompt: str) -> None:
        opened = [end for begin, end in PAIRS if prompt.rstrip().endswith(begin)]
        self._end: str | None = opened[0] if opened else None
        self._begun = bool(opened)
        self._held = ""
        self._trim = False

    def push(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Take a piece, and give what is sure, without the words around thoughts."""
        self._held += text
        if not self._begun:
            start = self._held.lstrip()
            if not start or any(begin.startswith(start) and begin != start for begin, _ in PAIRS):
                return
            self._begun = True
            for begin, end in PAIRS:
                if start.startswith(begin):
                    self._held, self._end = start[len(begin) :], end
        if self._end is not None:
            yield from self._thought(self._end)
        if self._end is None:
            yield from self._answer()

    def close(self) -> Iterator[tuple[Kind, str]]:
        """Give what was held back."""
        kind: Kind = "answer" if self._end is None else "thought"
        text, self._held = self._held, ""
        if text:
            yield kind, text

    def _thought(self, end: str) -> Iterator[tuple[Kind, str]]:
        at = self._held.find(end)
        if at >= 0:
            content, self._held, self._end, self._trim = self._held[:at], self._held[at + len(end) :], None, True
        else:
            n_held = next((n for n in range(len(end) - 1, 0, -1) if self._held.endswith(end[:n])), 0)
            cut = len(self._held) - n_held
            content, self._held = self._held[:cut], self._held[cut:]
        if content:
            yield "thought", content

    def _answer(self) -> Iterator[tuple[Kind, str]]:
        text = self._held.lstrip("\n") if self._trim else self._held  # blank lines after thoughts are layout
        self._held = ""
        if text:
            self._trim = False
            yield "answer", text
