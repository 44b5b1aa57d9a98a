"""From a request's text to token ids, off the event loop and with bounds.

A prompt of a million tokens takes seconds to tokenize. It does so in a thread of its own, one such prompt at a time, so
that short ones continue beside it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hybridkv.errors import ModelFileError
from hybridkv.server.channels import opens_thoughts, thoughts_of
from hybridkv.server.dialects import HERMES, dialect_of
from hybridkv.server.refusals import RefusalError
from hybridkv.server.taught import taught
from hybridkv.text.chat import MessageError, chat_prompt
from hybridkv.text.control_words import ControlWords
from hybridkv.text.templates import RESERVED, template_source, template_variables

LONG_CHARACTERS = 1 << 16
_SHORT_AT_ONCE = 2

FILL_IN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
"""Words for what is before, after and between, in vocabularies that were trained to fill in."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as tokens.

    Attributes
    ----------
    ids
        Up to where the answer begins.
    opened, may_think
        Whether the prompt ends inside of thoughts, and whether the answer may still open them.
    unknown
        Variables that the template does not read.
    marks
        Tokens before the user's last message: what a changed question has in common with this one.
    """

    ids: tuple[int, ...]
    opened: bool
    may_think: bool
    unknown: tuple[str, ...]
    marks: tuple[int, ...] = ()


class Prompts:
    """A model's tokenizer, for a server.

    Parameters
    ----------
    tokenizer
        A fast Transformers tokenizer.
    n_vocab
        Token ids are 0 to less than this.

    Attributes
    ----------
    template
        The chat template's text.
    thoughts, dialect
        How the model writes thoughts and calls.
    """

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self.tokenizer = tokenizer
        self._n_vocab = n_vocab
        self._words = ControlWords(tokenizer)
        self._short, self._long = asyncio.Semaphore(_SHORT_AT_ONCE), asyncio.Semaphore(1)
        self.template = template_source(tokenizer)
        self.variables = template_variables(self.template)
        self.thoughts = thoughts_of(self.template)
        self.dialect = dialect_of(self.template) if self.takes_tools else HERMES

    @property
    def can_chat(self) -> bool:
        """True if the model has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def takes_tools(self) -> bool:
        """True if the chat template writes tools; the prompt teaches them otherwise."""
        return "tools" in self.variables

    def tokens(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokenize a text, as llama-server's `/tokenize` does."""
        if parse_special:
            ids = self._words.encode(text, begins=False)
        else:
            cover = self._words.cover_of([text])
            ids = cover.encode(cover.cover(text))
        return self._words.enclose(ids) if add_special else ids

    async def completion(self, prompt: str | Sequence[int], suffix: str = "") -> tuple[int, ...]:
        """Tokenize a prompt; control words in it are control words, as in llama-server.

        Parameters
        ----------
        suffix
            What follows the answer.

        Raises
        ------
        RefusalError
            For ids that are no tokens, for a prompt without any, and for a suffix where the vocabulary has no words for
            it.
        """
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            ids = await self.in_thread(len(prompt), lambda: tuple(self._words.encode(prompt)))
        else:
            ids = tuple(prompt)
            if ids and max(ids) >= self._n_vocab:
                raise RefusalError(
                    400, f"prompt: {max(ids)}; this model's tokens are 0 to {self._n_vocab - 1}", param="prompt"
                )
        if suffix:
            ids = await self._fill_in(ids, suffix)
        if not ids:
            raise RefusalError(400, "the prompt has no tokens", param="prompt")
        return ids

    async def _fill_in(self, before: tuple[int, ...], suffix: str) -> tuple[int, ...]:
        check_text(suffix, "suffix")
        known = self.tokenizer.backend_tokenizer.get_vocab()
        words = next((triple for triple in FILL_IN if all(word in known for word in triple)), None)
        if words is None:
            raise RefusalError(
                400, "suffix: this model's vocabulary has no words for filling in; allowed: none", param="suffix"
            )
        first, hole, middle = (known[word] for word in words)
        after = await self.in_thread(len(suffix), lambda: self._words.encode(suffix, begins=False))
        return (first, *before, hole, *after, middle)

    async def chat(
        self,
        turns: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        variables: Mapping[str, Any],
        defaults: Container[str] = (),
    ) -> Rendered:
        """Tokenize a conversation, up to where the answer begins; what messages say is text, whatever it says.

        Parameters
        ----------
        turns, tools
            As chat templates take them.
        variables
            Of the chat template.
        defaults
            Variables that the server sets: a request is not told that the template does not read them.

        Raises
        ------
        RefusalError
            For a model without a chat template, and for what its template refuses.
        """
        if not self.can_chat:
            raise RefusalError(
                400, "this model has no chat template; /v1/completions continues any text", code="no_chat_template"
            )
        for number, turn in enumerate(turns):
            for field, value in turn.items():
                check_text(json.dumps(value, ensure_ascii=False), f"messages.{number}.{field}")
        check_text(json.dumps([tools, variables], ensure_ascii=False), "tools")
        given = self._given(variables)
        turns = [self._known_role(turn) for turn in turns]
        if self.takes_tools:
            given |= {"tools": list(tools)} if tools else {}
        else:
            turns = taught(turns, tools)
        unread = [name for name in variables if name not in self.variables and name not in defaults]
        if "thinking" in self.variables and "enable_thinking" in unread:
            unread.remove("enable_thinking")
        unknown = tuple(f"chat_template_kwargs.{name}" for name in unread)

        asked = [turn for turn in reversed(turns) if turn["role"] == "user"]

        def render() -> Rendered:
            prompt = chat_prompt(self._words, turns, given)
            text = prompt.text
            opened, may_think = self.thinks(text)
            ids, last = tuple(prompt.ids()), prompt.find_last(next((t["content"] for t in asked if t["content"]), ""))
            marks = () if last is None else (len(ids) - len(prompt.ids(last)),)
            return Rendered(ids, opened, may_think, unknown, marks)

        try:
            return await self.in_thread(sum(len(turn["content"]) for turn in turns), render)
        except MessageError as error:
            raise RefusalError(400, error.message, param=f"messages.{error.index}") from error
        except ModelFileError as error:  # its hint is for the command line
            raise RefusalError(400, error.message, param="messages") from error

    def thinks(self, text: str) -> tuple[bool, bool]:
        """Check whether a conversation's text ends inside of thoughts, and whether the answer may still open them."""
        opened = opens_thoughts(text, self.thoughts)
        closed = text.rstrip().endswith(self.thoughts[1])
        writes = any(word in self.template for word in self.thoughts)
        return opened, writes and not opened and not closed

    def _given(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Give variables the names that this template has for them."""
        bad = next((name for name in variables if name in RESERVED or not name.isidentifier()), None)
        if bad is not None:
            raise RefusalError(
                400, f"chat_template_kwargs: {bad!r} is no variable of a template's own", param="chat_template_kwargs"
            )
        given = dict(variables)
        if "enable_thinking" in given and "enable_thinking" not in self.variables and "thinking" in self.variables:
            given.setdefault("thinking", given["enable_thinking"])
        return given

    def _known_role(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Give a turn a role that the template knows: `developer` is OpenAI's newer word for `system`."""
        if turn["role"] == "developer" and "developer" not in self.template:
            return turn | {"role": "system"}
        return turn

    async def in_thread(self, n_characters: int, work: Callable[[], T]) -> T:
        """Do what takes time for long texts, off the event loop."""
        async with self._long if n_characters > LONG_CHARACTERS else self._short:
            return await asyncio.to_thread(work)


def check_text(text: str, param: str) -> None:
    """Refuse half of a surrogate pair, which JSON's escapes can write and no text holds.

    Raises
    ------
    RefusalError
        With the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusalError(400, f"{param}: character {error.start} is half of a surrogate pair", param=param) from error
