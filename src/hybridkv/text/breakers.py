"""DRY's sequence breakers as token ids: no repetition reaches across one. Called by the command line and the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridkv.text.detokenize import token_bytes

DRY_BREAKERS = ("\n", ":", '"', "*")
"""llama.cpp's defaults."""


def breaker_ids(tokenizer: Any, words: Sequence[str] = DRY_BREAKERS) -> frozenset[int]:
    """Find the tokens that contain one of the words; of a word that no token contains, its last token.

    Walks the whole vocabulary: a quarter of a second for 250,000 tokens.
    """
    wanted = [word.encode() for word in words if word]
    texts = (
        [token_bytes(tokenizer, token) for token in range(tokenizer.backend_tokenizer.get_vocab_size())]
        if wanted
        else []
    )
    found: set[int] = set()
    for word in wanted:
        holding = {token for token, text in enumerate(texts) if word in text}
        spelled = tokenizer.backend_tokenizer.encode(word.decode(), add_special_tokens=False).ids
        found |= holding or set(spelled[-1:])
    return frozenset(found)
