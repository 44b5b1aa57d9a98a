"""Calls of LiteLLM."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.calls.of_openai import City
from tests.server.calls.record import TOO_LONG, USER, WEATHER, Call
from tests.server.conftest import Running


def _options(server: Running) -> dict[str, Any]:
    return {"model": "openai/m", "api_base": f"{server.url}/v1", "api_key": "x", "num_retries": 0}


def _ask(server: Running, **options: Any) -> Any:
    return pytest.importorskip("litellm").completion(**_options(server), messages=USER, **options)


def answer(server: Running) -> None:
    """An answer, whole, streamed and awaited."""
    assert _ask(server, temperature=0.2, drop_params=True).choices[0].message.content == "It rains."
    assert "".join(c.choices[0].delta.content or "" for c in _ask(server, stream=True)) == "It rains."
    awaited = pytest.importorskip("litellm").acompletion(**_options(server), messages=USER)
    assert asyncio.run(awaited).choices[0].message.content == "It rains."


def tools(server: Running) -> None:
    """A tool is called."""
    [call] = _ask(server, tools=[WEATHER], tool_choice="auto").choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def thoughts(server: Running) -> None:
    """Thoughts stand where LiteLLM looks for them."""
    message = _ask(server).choices[0].message
    assert (message.content, message.reasoning_content) == ("It rains.", "Rain, I think.")


def schema(server: Running) -> None:
    """A class as the form of an answer."""
    said = _ask(server, response_format=City).choices[0].message.content
    assert City.model_validate_json(said) == City(city="Paris", degrees=21)


def too_long(server: Running) -> None:
    """LiteLLM falls back to another model on this error alone."""
    litellm = pytest.importorskip("litellm")
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**_options(server), messages=[{"role": "user", "content": "rain " * 5000}])


CALLS = (
    Call("litellm", "an answer", "text", answer),
    Call("litellm", "tools", "call", tools),
    Call("litellm", "thoughts", "thought", thoughts),
    Call("litellm", "a class by schema", "json", schema),
    Call("litellm", "too long a prompt", TOO_LONG, too_long),
)
