"""Tokens to text as they come: whole characters only, nothing said twice, nothing lost at the end.

A token of a byte-level vocabulary may end inside a character, and how a token is written depends on the ones before
it (the space before a word). So a short window of tokens is decoded again with each new one, and what it adds is
handed out once no character in it is unfinished. `tokenizers.decoders.DecodeStream` does the same, but repeats the
end of a prompt that ends in U+FFFD and keeps an unfinished character for itself at the end.
Called by the command line and by the server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""What an unfinished or invalid character is decoded as."""

_WINDOWS = (8, 64, 512)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""How SentencePiece vocabularies write a space."""


class TextStream:
    """The text of one growing sequence.

    Parameters
    ----------
    tokenizer
        A `TextTokenizer`, or a fast Transformers tokenizer.
    prompt_ids
        What the sequence continues, so that its first word is spaced rightly. Its text is not handed out.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        for size in _WINDOWS:
            self._window = list(prompt_ids[-size:])
            self._said = self._text()
            if not self._said.startswith(REPLACEMENT):  # it does not begin inside a character
                break
        self._n_said = len(self._window)

    def push(self, token: int) -> str:
        """Return the text that a token adds: none while a character is unfinished, or for a special token."""
        self._window.append(token)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) else self._hand_out(text)

    def close(self) -> str:
        """Return what is left: an unfinished character, as U+FFFD."""
        return self._hand_out(self._text())

    def _text(self) -> str:
        text: str = self._backend.decode(self._window, skip_special_tokens=True)
        return text

    def _hand_out(self, text: str) -> str:
        # Where the prompt ended inside a character, what was said of it differs from what is there now.
        same = len(self._said) if text.startswith(self._said) else len(os.path.commonprefix([self._said, text]))  # noqa: RUF071 - characters are meant
        added = text[same:]
        if added:
            self._window = self._window[self._n_said :]
            self._said = self._text()
            self._n_said = len(self._window)
        return added


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return a token in UTF-8: a part of a character for some, its name for a special token, nothing past the end."""
    backend = tokenizer.backend_tokenizer
    name: str | None = backend.id_to_token(token)
    if name is None:
        return b""
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    text: str = backend.decode([token], skip_special_tokens=False)
    if REPLACEMENT in text and all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    # Alone, a word of a SentencePiece vocabulary is decoded as the first of its text, without the space before it.
    space = name.startswith(_SPACE) and not text.startswith(" ")
    return (" " * space + text).encode()


def _byte_letters() -> dict[str, int]:
    """Map letters to the bytes for which byte-level vocabularies write them.

    Source: `bytes_to_unicode` of GPT-2's encoder.py: printable bytes stand for themselves, the others follow from 256.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
