"""Messages, tools and formats as clients send them, and messages as chat templates take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hybridkv.server.base import Fragment, Strict

MAX_TOOLS = 512
NAME_PATTERN = r"^[A-Za-z0-9_.:/-]{1,128}$"

Schema = dict[str, Any]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that an assistant made: arguments as JSON text, or as the object itself."""

    name: Name
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Strict):
    """One of an assistant's calls."""

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Convert for chat templates: arguments are an object where they are one."""
        arguments: Any = self.function.arguments
        if isinstance(arguments, str):
            try:
                read = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                read = None
            arguments = read if isinstance(read, dict) else arguments
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


_TURNS: Fragment = {"enum": ["system", "developer", "user", "tool"]}
_ROLES: Fragment = {
    "anyOf": [
        {
            "properties": {"role": _TURNS, "content": {"not": {"type": "null"}}, "tool_calls": {"type": "null"}},
            "required": ["content"],
        },
        {"properties": {"role": {"const": "assistant"}}},
    ]
}
"""Only an assistant may say nothing, and call tools: as JSON Schema, for the document."""


class Message(Strict):
    """One turn of a conversation."""

    model_config = Strict.model_config | {"json_schema_extra": _ROLES}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    reasoning_content: str | None = Field(None, description="not OpenAI's; an assistant's thoughts")
    tool_calls: list[ToolCall] | None = Field(None, max_length=1024)
    tool_call_id: str | None = Field(None, max_length=256)
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, data: Any) -> Any:
        parts = data.get("content") if isinstance(data, dict) else None
        kinds = [part.get("type") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise ValueError(f"content: a part of type {other!r}; allowed: text, for this server reads nothing else")
        return data

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: Field required")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only an assistant calls tools, not role {self.role!r}")
        return self

    @property
    def text(self) -> str:
        """All of its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """Convert for chat templates; what is absent is left out."""
        turn: dict[str, Any] = {"role": self.role, "content": self.text}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, field) is not None:
                turn[field] = getattr(self, field)
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return turn


class Function(Strict):
    """A function that a model may call."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that a model may call."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Convert for chat templates."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    """The name of a function."""

    name: Name


class NamedTool(Strict):
    """The tool that a model has to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class NamedSchema(Strict):
    """A JSON schema by its name."""

    name: str = Field("schema", max_length=256)
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form that the answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Schema | None = Field(None, alias="schema", description="not OpenAI's; of a json_object")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.asked is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        return self

    @property
    def asked(self) -> Schema | None:
        """The schema that was given."""
        named = None if self.json_schema is None else self.json_schema.schema_
        return self.schema_ if named is None else named
