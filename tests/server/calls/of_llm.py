"""Calls of simonw's llm, with a model of its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.server.calls.of_openai import City
from tests.server.calls.record import Call
from tests.server.conftest import Running

os.environ["LLM_LOAD_PLUGINS"] = ""  # the model's own package is one, and what it imports is not installed


def _model(server: Running) -> Any:
    llm = pytest.importorskip("llm")
    home = Path(tempfile.mkdtemp())
    os.environ["LLM_USER_PATH"] = str(home)
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: m\n  api_base: {server.url}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n"
    )
    model = llm.get_model("ours")
    model.key = "x"
    return model


def prompt(server: Running) -> None:
    """An answer, whole and streamed, with a system message."""
    model = _model(server)
    response = model.prompt("Hi", system="Be short.", stream=False)
    assert response.text() == "It rains."
    assert response.usage().output > 0
    assert "".join(model.prompt("Hi", temperature=0.5)) == "It rains."


def conversation(server: Running) -> None:
    """A second question carries the first."""
    talk = _model(server).conversation()
    assert talk.prompt("one").text() == talk.prompt("two").text() == "It rains."
    request = server.served.runner.handles[-1].request  # type: ignore[attr-defined]
    assert "<user>one<assistant>It rains.<user>two" in server.served.tokenizer.decode(request.prompt_ids)


def tools(server: Running) -> None:
    """A function of Python is called with what the model says."""

    def weather(city: str) -> str:
        """Tell the weather."""
        return f"21 C in {city}"

    response = _model(server).prompt("Hi", tools=[weather], stream=False)
    assert [(call.name, call.arguments) for call in response.tool_calls()] == [("weather", {"city": "Paris"})]
    assert [result.output for result in response.execute_tool_calls()] == ["21 C in Paris"]


def schema(server: Running) -> None:
    """An answer by a schema."""
    response = _model(server).prompt("Hi", schema=City, stream=False)
    assert json.loads(response.text()) == {"city": "Paris", "degrees": 21}


def options(server: Running) -> None:
    """Its options have OpenAI's names."""
    _model(server).prompt("Hi", max_tokens=3, seed=5, top_p=0.5, logit_bias='{"5": -10}', stream=False).text()
    request = server.served.runner.handles[-1].request  # type: ignore[attr-defined]
    assert (request.max_tokens, request.params.seed, request.params.logit_bias) == (3, 5, ((5, -10),))


CALLS = (
    Call("llm", "an answer", "text", prompt),
    Call("llm", "a conversation", "text", conversation),
    Call("llm", "tools", "call", tools),
    Call("llm", "a class by schema", "json", schema),
    Call("llm", "options", "text", options),
)
