"""From a request's text to token ids, off the event loop and with bounds.

A prompt of a million tokens takes seconds to cut up. It does so in a thread of its own, one such prompt at a time, so
that short ones go on beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hybridkv.errors import ModelFileError
from hybridkv.server.refusals import RefusalError
from hybridkv.server.schema import Message
from hybridkv.text.chat import MessageError, chat_prompt
from hybridkv.text.control_words import ControlWords

LONG_CHARACTERS = 1 << 16
_SHORT_AT_ONCE = 2

T = TypeVar("T")


class Prompts:
    """A model's tokenizer, for a server.

    Parameters
    ----------
    tokenizer
        A `TextTokenizer`, or a fast Transformers tokenizer.
    n_vocab
        Token ids are 0 to less than this.
    """

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self.tokenizer = tokenizer
        self._n_vocab = n_vocab
        self._words = ControlWords(tokenizer)
        self._short, self._long = asyncio.Semaphore(_SHORT_AT_ONCE), asyncio.Semaphore(1)

    @property
    def can_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    async def completion(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt; control words in it are control words, as in llama-server.

        Raises
        ------
        RefusalError
            For ids that are no tokens, and for a prompt without any.
        """
        if isinstance(prompt, str):
            _check_text(prompt, "prompt")
            ids = await self._in_thread(len(prompt), lambda: tuple(self._words.encode(prompt)))
        else:
            ids = tuple(prompt)
            if ids and max(ids) >= self._n_vocab:
                raise RefusalError(
                    400, f"prompt: {max(ids)}; this model's tokens are 0 to {self._n_vocab - 1}", param="prompt"
                )
        if not ids:
            raise RefusalError(400, "the prompt has no tokens", param="prompt")
        return ids

    async def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the answer begins; what messages say is text, whatever it says.

        Raises
        ------
        RefusalError
            For a model without a chat template, and for what its template refuses.
        """
        if not self.can_chat:
            raise RefusalError(
                400, "this model has no chat template; /v1/completions goes on from any text", code="no_chat_template"
            )
        turns = [message.for_template() for message in messages]
        for number, turn in enumerate(turns):
            _check_text(turn["content"], f"messages.{number}.content")

        def render() -> tuple[int, ...]:
            return tuple(chat_prompt(self._words, turns).ids())

        try:
            return await self._in_thread(sum(len(turn["content"]) for turn in turns), render)
        except MessageError as error:
            raise RefusalError(400, error.message, param=f"messages.{error.index}") from error
        except ModelFileError as error:  # its hint is for the command line
            raise RefusalError(400, error.message, param="messages") from error

    async def _in_thread(self, n_characters: int, work: Callable[[], T]) -> T:
        async with self._long if n_characters > LONG_CHARACTERS else self._short:
            return await asyncio.to_thread(work)


def _check_text(text: str, param: str) -> None:
    """Refuse half of a surrogate pair, which JSON's escapes can write and no text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusalError(400, f"{param}: character {error.start} is half of a surrogate pair", param=param) from error
