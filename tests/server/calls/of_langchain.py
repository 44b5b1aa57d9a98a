"""Calls of LangChain's OpenAI package."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.calls.of_openai import City
from tests.server.calls.record import WEATHER, Call
from tests.server.conftest import Running


def _model(server: Running, **options: Any) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    where = {"base_url": f"{server.url}/v1", "api_key": "x", "model": "m", "max_retries": 0}
    return langchain_openai.ChatOpenAI(**where, **options)


def invoke(server: Running) -> None:
    """An answer and its counts."""
    message = _model(server, temperature=0.3, seed=5).invoke([("system", "Be short."), ("human", "Hi")])
    assert message.content == "It rains."
    assert message.usage_metadata["total_tokens"] > message.usage_metadata["output_tokens"] > 0
    assert message.response_metadata["finish_reason"] == "stop"


def stream(server: Running) -> None:
    """Chunks that add up, the last with counts."""
    chunks = list(_model(server, stream_usage=True).stream("Hi"))
    assert "".join(chunk.content for chunk in chunks) == "It rains."
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


def batch(server: Running) -> None:
    """Several at once."""
    assert [message.content for message in _model(server).batch(["a", "b", "c"])] == ["It rains."] * 3


def tools(server: Running) -> None:
    """A bound tool is called, whole and streamed."""
    bound = _model(server).bind_tools([WEATHER], tool_choice="any")
    [call] = bound.invoke("Hi").tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    chunks = list(bound.stream("Hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Paris"}]


def agent_turn(server: Running) -> None:
    """A call and its result go back."""
    messages = pytest.importorskip("langchain_core.messages")
    bound = _model(server).bind_tools([WEATHER])
    asked = bound.invoke("Hi")
    result = messages.ToolMessage("21 C", tool_call_id=asked.tool_calls[0]["id"])
    assert bound.invoke([messages.HumanMessage("Hi"), asked, result]).usage_metadata["input_tokens"] > 60


def schema(server: Running) -> None:
    """A class through its JSON schema."""
    assert _model(server).with_structured_output(City, method="json_schema").invoke("Hi") == City(
        city="Paris", degrees=21
    )


def function(server: Running) -> None:
    """A class through a tool that has to be called."""
    model = _model(server).with_structured_output(City, method="function_calling")
    assert model.invoke("Hi") == City(city="Paris", degrees=21)


def mode(server: Running) -> None:
    """A class through JSON mode."""
    model = _model(server).with_structured_output(City, method="json_mode")
    assert model.invoke("Answer in JSON.") == City(city="Paris", degrees=21)


def text(server: Running) -> None:
    """The older interface to text."""
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", model="m", max_retries=0, max_tokens=50)
    assert model.invoke("Hi") == "It rains."


CALLS = (
    Call("langchain-openai", "an answer", "text", invoke),
    Call("langchain-openai", "a stream", "text", stream),
    Call("langchain-openai", "a batch", "text", batch),
    Call("langchain-openai", "tools", "call", tools),
    Call("langchain-openai", "results of tools", "call", agent_turn),
    Call("langchain-openai", "a class by schema", "json", schema),
    Call("langchain-openai", "a class by tool", "city call", function),
    Call("langchain-openai", "a class by JSON mode", "json", mode),
    Call("langchain-openai", "text", "text", text),
)
