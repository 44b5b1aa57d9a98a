"""Tokens to text as they come: whole characters only, one live sequence, the others printed at the end."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hybridkv.server.stops import StopStrings
from hybridkv.text.detokenize import TextStream


@dataclass(slots=True)
class Sequence:
    """One generated sequence: its ids (the end token left out) and its text so far."""

    decoder: TextStream | None
    stops: StopStrings
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False


class Streams:
    """The sequences of a run.

    Parameters
    ----------
    tokenizer
        A fast Transformers tokenizer; None prints token ids.
    prompt_ids
        What the sequences continue, so that the first word is spaced rightly.
    prompt
        Their text, written before the first token.
    end_ids
        Tokens that end a sequence.
    live
        Whether the first sequence is written to stdout as it grows.
    stops
        Texts before which a sequence ends.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        prompt_ids: list[int],
        n_seqs: int,
        end_ids: set[int],
        *,
        prompt: str,
        live: bool,
        stops: Collection[str] = (),
    ) -> None:
        self._end_ids = end_ids
        self._live = live
        self._prompt = prompt
        self.sequences = [
            Sequence(None if tokenizer is None else TextStream(tokenizer, prompt_ids), StopStrings(tuple(stops)))
            for _ in range(n_seqs)
        ]

    @property
    def all_ended(self) -> bool:
        """True if every sequence has met its end token."""
        return all(s.ended for s in self.sequences)

    @property
    def all_stopped(self) -> bool:
        """True if every sequence has reached one of its stop texts."""
        return all(s.stops.found for s in self.sequences)

    def write(self, text: str) -> None:
        """Write to stdout at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def _write_prompt(self) -> None:
        if self._live and self._prompt:
            self.write(self._prompt)
            self._prompt = ""

    def push(self, tokens: tuple[int, ...]) -> None:
        """Add one token to each sequence that has not ended."""
        self._write_prompt()
        for index, (sequence, token) in enumerate(zip(self.sequences, tokens, strict=True)):
            if sequence.ended or token in self._end_ids:
                sequence.ended = True
                continue
            sequence.ids.append(token)
            self._add(index, f"{token} " if sequence.decoder is None else sequence.decoder.push(token))

    def _add(self, index: int, piece: str) -> None:
        sequence = self.sequences[index]
        piece = sequence.stops.push(piece)
        sequence.ended |= sequence.stops.found
        self._write_piece(index, piece)

    def _write_piece(self, index: int, piece: str) -> None:
        self.sequences[index].text += piece
        if self._live and index == 0:
            self.write(piece)

    def close(self) -> None:
        """End the texts and the live line, and print the other sequences."""
        self._write_prompt()
        for index, sequence in enumerate(self.sequences):
            if sequence.decoder is not None:
                self._add(index, sequence.decoder.close())
            self._write_piece(index, sequence.stops.close())
        if not self._live:
            return
        self.write("\n")
        for index, sequence in enumerate(self.sequences[1:], start=2):
            self.write(f"\n--- sequence {index} of {len(self.sequences)}\n{sequence.text}\n")
