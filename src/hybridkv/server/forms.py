"""From what a request asks of an answer's form to what steers its tokens: a grammar, a thinking budget, or both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hybridkv.server.grammar import Grammar, Grammars, of_calls, of_schema
from hybridkv.server.messages import Schema
from hybridkv.server.prompts import Prompts, Rendered
from hybridkv.server.schema import ChatRequest, CompletionRequest
from hybridkv.server.steering import Steer, Thinking, line_ends
from hybridkv.text.detokenize import token_bytes

_ANY_OBJECT: Schema = {"type": "object"}


class Forms:
    """Makes steering for one model.

    Parameters
    ----------
    prompts
        Its tokenizer and how it writes.
    n_vocab
        Logits of the model.
    end_ids
        Tokens that end an answer.
    """

    def __init__(self, prompts: Prompts, n_vocab: int, end_ids: Sequence[int]) -> None:
        self._prompts = prompts
        self._grammars = Grammars(prompts.tokenizer, n_vocab, end_ids)

    async def steering(
        self, body: CompletionRequest | ChatRequest, rendered: Rendered | None, budget: int | None
    ) -> Steer | None:
        """Build what steers one sequence; None for nothing.

        Parameters
        ----------
        rendered
            The conversation, of a chat.
        budget
            Tokens of thought at most; None for any number.

        Raises
        ------
        UsageError
            For a form that is not taken.
        """
        thinks = None if rendered is None else (rendered.opened, rendered.may_think)
        return await self._steer(self._calls(body) or _form(body), thinks, budget)

    async def steer(self, grammar: Grammar | None, text: str | None, budget: int | None) -> Steer | None:
        """Build what steers the answer to a conversation's text, or to a plain prompt (None).

        Raises
        ------
        UsageError
            For a grammar that is not taken.
        """
        return await self._steer(grammar, None if text is None else self._prompts.thinks(text), budget)

    async def _steer(
        self, grammar: Grammar | None, thinks: tuple[bool, bool] | None, budget: int | None
    ) -> Steer | None:
        if grammar is None and (budget is None or thinks is None):
            return None
        matcher = None if grammar is None else await self._grammars.matcher(grammar)
        return Steer(self._bytes, None if thinks is None else self._thinking(*thinks, budget), matcher)

    def _bytes(self, token: int) -> bytes:
        return token_bytes(self._prompts.tokenizer, token)

    def _thinking(self, opened: bool, may_open: bool, budget: int | None) -> Thinking:
        opens, closes = self._prompts.thoughts
        line_end_ids = [i for text in ("\n", "\n\n") for i in self._ids(text)]
        return Thinking(
            opens=opens,
            closes=closes,
            opened=opened,
            may_open=may_open,
            open_ids=self._ids(opens),
            close_ids=self._ids(closes),
            gap_ids=line_ends(self._bytes, sorted(set(line_end_ids))),
            budget=budget,
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._prompts.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _calls(self, body: CompletionRequest | ChatRequest) -> Grammar | None:
        """Build the grammar of calls, where there has to be one, or JSON that is no call."""
        if not isinstance(body, ChatRequest) or not body.tools or body.tool_choice == "none":
            return None
        schema, choice = _schema(body), body.tool_choice
        if choice in (None, "auto") and schema is None:
            return None
        named = None if choice is None or isinstance(choice, str) else choice.function.name
        tools = {
            tool.function.name: tool.function.parameters or {}
            for tool in body.tools
            if named in (None, tool.function.name)
        }
        other = schema if choice in (None, "auto") else None
        several = body.parallel_tool_calls is not False and named is None
        return of_calls(self._prompts.dialect, tools, self._word, several=several, or_schema=other)

    def _word(self, word: str) -> str:
        """Write a dialect's word in Lark: by its id where it is an added token, which no text spells for llguidance."""
        added = self._prompts.tokenizer.backend_tokenizer.get_added_tokens_decoder()
        index = next((i for i, token in added.items() if token.content == word), None)
        return json.dumps(word, ensure_ascii=False) if index is None else f"<[{index}]>"


def _schema(body: CompletionRequest | ChatRequest) -> Schema | None:
    form: Any = body.response_format
    if form is not None and form.type != "text":
        asked: Schema | None = form.asked
        return _ANY_OBJECT if asked is None else asked
    return body.json_schema


def _form(body: CompletionRequest | ChatRequest) -> Grammar | None:
    """Choose the grammar that a request asks for."""
    if (schema := _schema(body)) is not None:
        return of_schema(schema)
    if (grammar := body.grammar) is not None:
        return Grammar("gbnf", grammar)
    if (regex := body.regex) is not None:
        return Grammar("regex", regex)
    return None
