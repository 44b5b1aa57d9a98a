"""Prompts become the tokens that the tokenizer itself makes of them, whatever its file says of truncation."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from hybridkv.server.prompts import LONG_CHARACTERS, Prompts
from hybridkv.server.schema import Message
from tests.server.conftest import TEMPLATE

TEXTS = ("Hello world", "a\u0000b 😀 <|endoftext|> x", "word " * (LONG_CHARACTERS // 4))


def test_tokens_are_the_tokenizers_own(tokenizer: Any) -> None:
    spoiled = copy.deepcopy(tokenizer)
    spoiled.chat_template = TEMPLATE
    spoiled.backend_tokenizer.enable_truncation(4)
    spoiled.backend_tokenizer.enable_padding(length=32)
    prompts = Prompts(spoiled, 8192)

    async def encode() -> list[tuple[int, ...]]:
        return list(await asyncio.gather(*(prompts.completion(text) for text in TEXTS * 3)))

    assert asyncio.run(encode()) == [tuple(tokenizer.encode(text)) for text in TEXTS * 3]
    chat = asyncio.run(prompts.chat([Message(role="user", content="Hello world")]))
    assert chat == tuple(tokenizer.encode("<user>Hello world:", add_special_tokens=False))
