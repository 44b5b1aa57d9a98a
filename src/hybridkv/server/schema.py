"""What clients may send, in OpenAI's names: checked strictly, so that no field is ever silently without effect.

Owns the shapes of requests and the words for what is wrong with one. Replies are in `hybridkv.server.replies`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from hybridkv.engine.requests import MAX_LOGPROBS
from hybridkv.formats import FORMATS

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**63 - 1
ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
"""Of a session's name: nothing that means something in a path."""
MIN_TEMPERATURE = 1e-3
"""Below, and not 0, logits / temperature leaves float32."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # says something of tools alone
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not offered, and the values (beside null) that ask for nothing."""

_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


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


Fragment = dict[str, Any]


def _either(*, absent: str, given: str) -> Fragment:
    """A field that is left out or null, unless another is true: as JSON Schema, for the document."""
    return {
        "anyOf": [
            {"properties": {absent: {"type": "null"}}},
            {"properties": {given: {"const": True}}, "required": [given]},
        ]
    }


_TOGETHER: Fragment = {"allOf": [_either(absent="stream_options", given="stream")]}
_CHAT_TOGETHER: Fragment = {
    "allOf": [
        *_TOGETHER["allOf"],
        _either(absent="top_logprobs", given="logprobs"),
        {
            "anyOf": [
                {"properties": {"max_tokens": {"type": "null"}}},
                {"properties": {"max_completion_tokens": {"type": "null"}}},
            ]
        },
    ]
}
_TEMPERATURE: Fragment = {
    "anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2}, {"type": "null"}]
}


def _whole(value: Any) -> Any:
    """Make integers of numbers such as 4.0, which are integers in JSON Schema's words."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {name: _whole(item) for name, item in value.items()} if isinstance(value, dict) else value


class Strict(BaseModel):
    """No unknown field, no number in a string, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Strict):
    """What a stream carries beside its text."""

    include_usage: bool | None = Field(None, description="one more chunk at the end, with the counts of tokens")
    include_obfuscation: Literal[False] | None = Field(None, description="not offered")


class KVTypesField(Strict):
    """How this request's KV cache is stored, in place of the server's own types."""

    type_k: str = Field(max_length=32, json_schema_extra={"enum": list(FORMATS)})
    type_v: str = Field(max_length=32, json_schema_extra={"enum": list(FORMATS)})
    rotate_k: bool = False
    rotate_v: bool = False
    tail: int = Field(0, ge=0, lt=2**31)
    sink: int = Field(0, ge=0, lt=2**31)


class Common(Strict):
    """What both kinds of completion take."""

    model: str | None = Field(None, max_length=512, description="the served model's name; the only one if left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**40)
    n: Literal[1] | None = Field(None, description="one answer a request")
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    stop: Annotated[list[Text] | None, BeforeValidator(_as_list, json_schema_input_type=list[Text] | Text | None)] = (
        Field(None, max_length=MAX_STOPS)
    )
    temperature: Annotated[float | None, WithJsonSchema(_TEMPERATURE)] = Field(
        None, ge=0, le=2, description=f"0 (greedy), or {MIN_TEMPERATURE} to 2; default 1"
    )
    top_p: float | None = Field(None, gt=0, le=1, description="default 1: keeps all")

    top_k: int | None = Field(None, ge=0, lt=2**31, description="not OpenAI's; default 0: keeps all")
    min_p: float | None = Field(None, ge=0, le=1, description="not OpenAI's; default 0: keeps all")
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64, description="not OpenAI's")
    ignore_eos: bool | None = Field(None, description="not OpenAI's; go on past the end-of-text token")
    cache_prompt: bool | None = Field(None, description="not OpenAI's; whether to begin from a stored prefix")
    session: str | None = Field(
        None,
        max_length=64,
        description="not OpenAI's; what it can be saved as",
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
        return _whole(_drop_neutral(data, _NEUTRAL))

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"allowed: 0 (greedy), or {MIN_TEMPERATURE} to 2")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


def _one_prompt(value: Any) -> Any:
    """A prompt, or a list of exactly one."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts; allowed: one a request")
        return value[0]
    return value


class CompletionRequest(Common):
    """The body of `/v1/completions`."""

    model_config = ConfigDict(json_schema_extra=_TOGETHER)

    prompt: Annotated[
        str | list[TokenId],
        BeforeValidator(_one_prompt, json_schema_input_type=str | Annotated[list[TokenId], Field(min_length=1)]),
    ] = Field(description="text, or token ids; a list of one prompt is taken too")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, data: Any) -> Any:
        return _drop_neutral(data, _MESSAGE_NEUTRAL)

    def for_template(self) -> dict[str, str]:
        """As chat templates take it: `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """The body of `/v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra=_CHAT_TOGETHER)

    messages: list[Message] = Field(min_length=1, max_length=65536)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**40)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens were given together; allowed: one of them")
        return self
