"""The server's replies, in OpenAI's names: their shapes, and nothing of how they come about."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

Finish = Literal["stop", "length", "tool_calls"]


class Reply(BaseModel):
    """A reply; fields are listed in the order in which they are sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Sparse(Reply):
    """A reply in which a field that says nothing is left out, not null."""

    @model_serializer(mode="wrap")
    def _leave_out(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None or name in self.kept}

    @property
    def kept(self) -> tuple[str, ...]:
        """Fields that are null rather than absent."""
        return ()


class PromptDetails(Reply):
    """Of the prompt's tokens, how many came from a stored prefix."""

    cached_tokens: int


class CompletionDetails(Reply):
    """Of the answer's tokens, how many were thoughts and how many were guessed; and guesses that were wrong."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Reply):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CompletionLogprobs(Reply):
    """Log probabilities as `/v1/completions` gives them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TopLogprob(Reply):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log probabilities as `/v1/chat/completions` gives them."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionChoice(Reply):
    """The answer, or in a stream a piece of it."""

    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(Reply):
    """The reply of `/v1/completions`, and a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Called(Sparse):
    """A function that is called; in a stream, a piece of its arguments' JSON."""

    name: str | None = None
    arguments: str


class Call(Sparse):
    """A tool call, or a piece of one with its index."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: Called


class AssistantMessage(Sparse):
    """A whole answer; `reasoning_content` is not OpenAI's."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Fields that are null rather than absent."""
        return ("content", "refusal")


class ChatChoice(Reply):
    """The answer."""

    index: int = 0
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Reply):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class MessageDelta(Sparse):
    """The addition of a chunk to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ChatChunkChoice(Reply):
    """A piece of the answer."""

    index: int = 0
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Reply):
    """A chunk of a chat completion's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(Reply):
    """The served model. The last four fields are not OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_length: int
    cache_type_k: str
    cache_type_v: str
    chat: bool


class Models(Reply):
    """The reply of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Session(Reply):
    """A session that was saved or restored; the file holds `n_held` of its tokens, which a restore does not count."""

    id: str
    object: Literal["session"] = "session"
    n_tokens: int
    n_held: int | None


class Health(Reply):
    """The reply of `/health`."""

    status: Literal["ok", "stopping"]


class Status(Reply):
    """The figures of the chat page: bytes, and tokens per second of the last few seconds."""

    model: str
    types: str
    chat: bool
    n_ctx: int
    parallel: int
    running: int
    waiting: int
    kv_bytes: int
    kv_bytes_used: int
    state_bytes: int
    reserved_bytes: int
    budget_bytes: int | None
    prefix_bytes: int
    generated_tokens: int
    generation_tok_s: float
    uptime_s: float


class RefusalCounts(Reply):
    """The counts behind a refusal for lack of room."""

    n_tokens: int
    most_tokens: int | None
    planned_bytes: int
    budget_bytes: int | None


class ErrorBody(Reply):
    """The error of a reply; `numbers` is not OpenAI's."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    numbers: RefusalCounts | None = None


class Error(Reply):
    """The reply to a request that fails, with any status from 400 on."""

    error: ErrorBody
