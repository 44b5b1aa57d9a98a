"""OpenAI's library against a server, in depth; `test_calls.py` has the calls of other libraries."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hybridkv.engine.requests import Event
from tests.server.conftest import Running, Scripter

USER = [{"role": "user", "content": "What is the weather?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>\nRain, I think.\n</think>\n\nIt rains."


@pytest.fixture
def saying(scripted: Scripter, tokenizer: Any) -> Any:
    def start(text: str, **served: Any) -> Running:
        script = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return scripted(*script, 0, chat=True, n_ctx=2048, **served)

    return start


def test_openai_tools(saying: Any) -> None:
    server = saying(CALL)
    chat = server.client.chat.completions
    reply = chat.create(model="m", messages=USER, tools=[TOOL]).choices[0]
    [call] = reply.message.tool_calls
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Paris"},
    )
    with chat.stream(model="m", messages=USER, tools=[TOOL]) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Paris"}
    pieces = [c.choices[0].delta.tool_calls for c in chat.create(model="m", messages=USER, tools=[TOOL], stream=True)]
    pieces = [piece[0] for piece in pieces if piece]
    assert len(pieces) > 2
    assert [piece.id is not None for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"city": "Paris"}
    turns = [*USER, reply.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "21 C"}]
    assert chat.create(model="m", messages=turns, tools=[TOOL]).usage.prompt_tokens > 100
    unasked = chat.create(model="m", messages=USER, tools=[TOOL], tool_choice="none").choices[0]
    assert (unasked.message.content, unasked.message.tool_calls, unasked.finish_reason) == (CALL, None, "stop")


def test_openai_thoughts(saying: Any) -> None:
    server = saying(THOUGHT)
    chat = server.client.chat.completions
    message = chat.create(model="m", messages=USER).choices[0].message
    assert (message.content, message.reasoning_content) == ("It rains.", "Rain, I think.")
    deltas = [c.choices[0].delta for c in chat.create(model="m", messages=USER, stream=True)]
    assert "".join(d.content or "" for d in deltas) == "It rains."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Rain, I think."
    plain = chat.create(model="m", messages=USER, extra_body={"reasoning_format": "none"}).choices[0].message
    assert plain.content == THOUGHT
    assert not hasattr(plain, "reasoning_content")
    usage = chat.create(model="m", messages=USER).usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    cut = chat.create(model="m", messages=USER, max_tokens=9).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("", "length")
    assert cut.message.reasoning_content


def test_stop_strings_are_the_answers(saying: Any) -> None:
    """Thoughts are full of line ends; a stop string ends what is said after them."""
    message = saying(THOUGHT).client.chat.completions.create(model="m", messages=USER, stop=["I think", "rains"])
    assert message.choices[0].message.content == "It "
    assert message.choices[0].message.reasoning_content == "Rain, I think."


def test_openai_several_answers(saying: Any) -> None:
    server = saying("It rains.")
    chat = server.client.chat.completions.create(model="m", messages=USER, n=3, seed=5)
    assert [(c.index, c.message.content, c.finish_reason) for c in chat.choices] == [
        (index, "It rains.", "stop") for index in range(3)
    ]
    assert [handle.request.params.seed for handle in server.served.runner.handles] == [5, 6, 7]
    assert chat.usage.prompt_tokens * 3 == sum(len(t.request.prompt_ids) for t in server.served.runner.handles)
    text = server.client.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=50, stream=True)
    said = ["", "", "", ""]
    for chunk in text:
        for choice in chunk.choices:
            said[choice.index] += choice.text
    assert said == ["It rains."] * 4


def test_one_of_many_that_fails_is_an_error(scripted: Scripter) -> None:
    server = scripted(5, Event(finished="error", message="broken"))
    with pytest.raises(Exception, match="broken"):
        server.client.completions.create(model="m", prompt="x", n=2)
