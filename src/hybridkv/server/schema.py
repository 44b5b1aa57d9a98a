"""The requests of clients, in OpenAI's names: checked strictly, so that no field is ever silently without effect.

Owns the shapes of requests and the words for what is wrong with one. `hybridkv.server.habits` brings what clients send
in other words into these shapes first, unless the server is strict. Replies are in `hybridkv.server.replies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from hybridkv.engine.requests import MAX_LOGPROBS
from hybridkv.formats import FORMATS
from hybridkv.options import COMMON, OWN, KVOption
from hybridkv.server.base import Fragment, Strict, TokenId, whole
from hybridkv.server.messages import MAX_TOOLS, Message, ResponseFormat, Schema, Tool, ToolChoice
from hybridkv.server.sampler_fields import MAX_SEED, SamplerFields

__all__ = ["MAX_SEED", "ChatRequest", "Common", "CompletionRequest", "Message"]

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ANSWERS = 64
"""Answers to one request: prompts times `n`."""
MAX_GRAMMAR = 1 << 16
"""Characters of a grammar or a regular expression."""
ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
"""Of a session's name: nothing that means something in a path."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not offered, and the values (beside null) that ask for nothing."""

ReasoningFormat = Literal["auto", "none", "deepseek", "deepseek-legacy"]


def _drop_neutral(data: Any, neutral: Mapping[str, tuple[Any, ...]]) -> Any:
    """Take out what asks for nothing; refuse what asks for something that is not offered."""
    if not isinstance(data, dict):
        return data
    kept = dict(data)
    for name in neutral.keys() & kept.keys():
        value = kept.pop(name)
        if value is not None and value not in neutral[name]:
            allowed = ", ".join(["null", *map(repr, neutral[name])])
            raise ValueError(f"{name} is not offered by this server; allowed: {allowed}")
    return kept


def _either(*, absent: str, given: str) -> Fragment:
    """Describe, for the document, a field that is left out or null unless another is true."""
    return {
        "anyOf": [
            {"properties": {absent: {"type": "null"}}},
            {"properties": {given: {"const": True}}, "required": [given]},
        ]
    }


def _one_of(*names: str) -> Fragment:
    """Describe, for the document, that at most one of these fields is given."""
    return {"anyOf": [{"properties": {other: {"type": "null"} for other in names if other != name}} for name in names]}


_FORMATS = ("response_format", "grammar", "regex", "json_schema")
_TOGETHER: Fragment = {"allOf": [_either(absent="stream_options", given="stream")]}
_COMPLETION_TOGETHER: Fragment = {
    "allOf": [
        *_TOGETHER["allOf"],
        _one_of(*_FORMATS),  # not of chats too: schemathesis gives up on so many at once
        {
            "anyOf": [
                {"properties": {"echo": {"enum": [None, False]}}},
                {"properties": {"suffix": {"enum": [None, ""]}}},
            ]
        },
    ]
}
_CHAT_TOGETHER: Fragment = {
    "allOf": [
        *_TOGETHER["allOf"],
        _either(absent="top_logprobs", given="logprobs"),
        _one_of("max_tokens", "max_completion_tokens"),
    ]
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class StreamOptions(Strict):
    """The extras of a stream beside its text."""

    include_usage: bool | None = Field(None, description="one more chunk at the end, with the counts of tokens")
    include_obfuscation: Literal[False] | None = Field(None, description="not offered")


def _kv_field(option: KVOption) -> Any:
    if option.kind == "type":
        return (str, Field(max_length=32, json_schema_extra={"enum": list(FORMATS)}))
    return (bool, False) if option.is_switch else (int, Field(0, ge=0, lt=2**31))


if TYPE_CHECKING:

    class _KVTypes(Strict):
        pass

else:
    _FIELDS = {option.name: _kv_field(option) for option in (*OWN, *COMMON) if option.in_requests}
    _KVTypes = create_model("_KVTypes", __base__=Strict, **_FIELDS)


class KVTypesField(_KVTypes):
    """The types of this request's KV cache, in place of the server's own."""


class Common(SamplerFields):
    """The fields that both kinds of completion take."""

    model: str | None = Field(None, max_length=512, description="the served model's name; the only one if left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**40)
    until_full: bool | None = Field(None, description="not OpenAI's; generate until the context is full")
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    stop: Annotated[list[Text] | None, BeforeValidator(_as_list, json_schema_input_type=list[Text] | Text | None)] = (
        Field(None, max_length=MAX_STOPS)
    )
    response_format: ResponseFormat | None = None
    grammar: str | None = Field(
        None, min_length=1, max_length=MAX_GRAMMAR, description="not OpenAI's; llama.cpp's GBNF, or Lark"
    )
    regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR, description="not OpenAI's")
    json_schema: Schema | None = Field(None, description="not OpenAI's; as response_format with this schema")

    stop_token_ids: list[TokenId] | None = Field(None, max_length=64, description="not OpenAI's")
    ignore_eos: bool | None = Field(None, description="not OpenAI's; continue after the end-of-text token")
    cache_prompt: bool | None = Field(None, description="not OpenAI's; whether to begin from a stored prefix")
    session: str | None = Field(
        None,
        max_length=64,
        description="not OpenAI's; name of the session to save",
        json_schema_extra={"pattern": ID_PATTERN},
    )
    kv_types: KVTypesField | None = Field(None, description="not OpenAI's")

    user: str | None = Field(None, max_length=512, description="accepted; nothing is done with it")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="accepted; nothing is done with it")
    safety_identifier: str | None = Field(None, max_length=512, description="accepted; nothing is done with it")
    prompt_cache_key: str | None = Field(None, max_length=512, description="accepted; prefixes are found without it")
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = Field(None, description="nothing is kept")

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, data: Any) -> Any:
        return whole(_drop_neutral(data, _NEUTRAL))

    @model_validator(mode="after")
    def _check_together(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        given = [name for name in _FORMATS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given together; allowed: one of them")
        return self


def _prompts(value: Any) -> Any:
    """Turn what may be one prompt into a list of prompts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and not (value and isinstance(value[0], (str, list))):
        return [value]
    return value


Prompt = str | list[TokenId]


class CompletionRequest(Common):
    """The body of `/v1/completions`."""

    model_config = Strict.model_config | {"json_schema_extra": _COMPLETION_TOGETHER}

    prompt: Annotated[
        list[Prompt],
        BeforeValidator(
            _prompts, json_schema_input_type=str | Annotated[list[TokenId], Field(min_length=1)] | list[Prompt]
        ),
    ] = Field(description="text, or token ids, or a list of prompts")
    max_tokens: int | None = Field(None, ge=0, le=2**40, description="default 16; 0 with echo scores the prompt")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="put the prompt before the answer, with its log probabilities if asked")
    suffix: str | None = Field(None, description="what follows the answer; needs a vocabulary with fill-in tokens")
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="as n: of as many, all are returned")

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of}; allowed: n, {self.n or 1}")
        n_answers = (self.n or 1) * len(self.prompt)
        if n_answers > MAX_ANSWERS:
            raise ValueError(f"prompt: {n_answers} answers to {len(self.prompt)} prompts; allowed: {MAX_ANSWERS}")
        if self.suffix and self.echo:
            raise ValueError("echo and suffix were given together; allowed: one of them")
        return self


class ChatRequest(Common):
    """The body of `/v1/chat/completions`."""

    model_config = Strict.model_config | {"json_schema_extra": _CHAT_TOGETHER}

    messages: list[Message] = Field(min_length=1, max_length=65536)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**40)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false ends the answer at its first call")
    reasoning_effort: str | None = Field(
        None, max_length=32, description="a variable of the chat template; none turns thinking off"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="not OpenAI's; variables of the chat template"
    )
    preserve_thinking: bool | None = Field(
        None, description="not OpenAI's; keep earlier turns' thoughts in the prompt, where the chat template can"
    )
    reasoning_format: ReasoningFormat | None = Field(
        None, description="not OpenAI's; none leaves thoughts in the content"
    )
    reasoning_budget: int | None = Field(
        None, ge=-1, lt=2**31, description="not OpenAI's; tokens of thought at most; -1: any number"
    )

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens were given together; allowed: one of them")
        if isinstance(self.tool_choice, str) and self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice required needs tools")
        if self.tool_choice is not None and not isinstance(self.tool_choice, str):
            name = self.tool_choice.function.name
            if name not in {tool.function.name for tool in self.tools or ()}:
                raise ValueError(f"tool_choice: no tool is called {name!r}")
        return self
