"""The places where prompts are cut: the same ones wherever a sequence begins to process its prompt."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PIECE = 64
"""Tokens of the pieces of a first chunk on a CPU, where 64 tokens run as fast as 256: short prompts, too, leave
something behind. A card would read its weights once for each."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Cuts at the multiples of `chunk`, and within the first chunk at the multiples of `first`."""

    chunk: int
    first: int

    @classmethod
    def on(cls, device: str, chunk: int) -> Pieces:
        """Choose the pieces for a device."""
        return cls(chunk, min(chunk, FIRST_PIECE) if device == "cpu" else chunk)

    def after(self, position: int) -> int:
        """Find the next cut behind a place."""
        if position < self.chunk:
            return min(self.chunk, (position // self.first + 1) * self.first)
        return (position // self.chunk + 1) * self.chunk

    def cuts_at(self, position: int) -> bool:
        """Check whether a place is one."""
        return position % (self.first if position < self.chunk else self.chunk) == 0
