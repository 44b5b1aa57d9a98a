"""Calls of OpenAI's own library."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.server.calls.record import TOO_LONG, USER, WEATHER, Call
from tests.server.conftest import Running


class City(BaseModel):
    """What an answer is read as."""

    city: str
    degrees: int


def _chat(server: Running) -> Any:
    return server.client.chat.completions


def _answer(server: Running, **options: Any) -> Any:
    return _chat(server).create(model="m", messages=USER, **options).choices[0]


def _params(server: Running) -> Any:
    return server.served.runner.handles[-1].request.params  # type: ignore[attr-defined]


def models(server: Running) -> None:
    """List them, and ask for one."""
    [model] = server.client.models.list().data
    assert server.client.models.retrieve(model.id).id == model.id == "scripted"


def answer(server: Running) -> None:
    """An answer, why it ended and its counts."""
    reply = _chat(server).create(model="m", messages=USER)
    choice = reply.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("It rains.", "assistant", "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.object == "chat.completion"


def streamed(server: Running) -> None:
    """Pieces, and one chunk without choices that counts."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(_chat(server).create(model="m", messages=USER, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "It rains."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens > 0) == ([], True)


def stream_helper(server: Running) -> None:
    """The library's own reader of streams."""
    with _chat(server).stream(model="m", messages=USER) as stream:
        said = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(said) == "It rains."
    assert stream.get_final_completion().choices[0].message.content == "It rains."


def parsed(server: Running) -> None:
    """An answer read into a class, through its JSON schema."""
    reply = _chat(server).parse(model="m", messages=USER, response_format=City)
    assert reply.choices[0].message.parsed == City(city="Paris", degrees=21)


def parsed_tool(server: Running) -> None:
    """A tool's arguments read into a class, which makes the tool strict."""
    tool = openai.pydantic_function_tool(City)
    [call] = _chat(server).parse(model="m", messages=USER, tools=[tool]).choices[0].message.tool_calls
    assert call.function.parsed_arguments == City(city="Paris", degrees=21)


def json_mode(server: Running) -> None:
    """Any JSON object."""
    said = _answer(server, response_format={"type": "json_object"}).message.content
    assert json.loads(said) == {"city": "Paris", "degrees": 21}


def named_tool(server: Running) -> None:
    """The one tool that has to be called."""
    choice = {"type": "function", "function": {"name": "weather"}}
    reply = _answer(server, tools=[WEATHER], tool_choice=choice)
    assert [call.function.name for call in reply.message.tool_calls] == ["weather"]


def parallel_calls(server: Running) -> None:
    """Two calls, each with an id of its own."""
    calls = _answer(server, tools=[WEATHER], tool_choice="required", parallel_tool_calls=True).message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2


def one_call(server: Running) -> None:
    """No more than one, where several are not wanted."""
    reply = _answer(server, tools=[WEATHER], parallel_tool_calls=False)
    assert [json.loads(c.function.arguments)["city"] for c in reply.message.tool_calls] == ["Paris"]
    assert reply.finish_reason == "tool_calls"


def tool_results(server: Running) -> None:
    """A call goes back as it came, with what the tool said."""
    first = _answer(server, tools=[WEATHER])
    said = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "21 C"}
    turns = [*USER, first.message, said]
    again = _chat(server).create(model="m", messages=turns, tools=[WEATHER])
    assert again.usage.prompt_tokens > 60


def several(server: Running) -> None:
    """Three answers, each drawn with a seed of its own."""
    reply = _chat(server).create(model="m", messages=USER, n=3, seed=7, temperature=0.9)
    assert [choice.message.content for choice in reply.choices] == ["It rains."] * 3
    assert [t.request.params.seed for t in server.served.runner.handles] == [7, 8, 9]  # type: ignore[attr-defined]


def logprobs(server: Running) -> None:
    """What each token was worth, and the likeliest beside it."""
    content = _answer(server, logprobs=True, top_logprobs=2).logprobs.content
    assert "".join(token.token for token in content) == "It rains."
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in content)


def stops(server: Running) -> None:
    """A text at which the answer ends, and which is no part of it."""
    choice = _answer(server, stop=["ains", "zzz"])
    assert (choice.message.content, choice.finish_reason) == ("It r", "stop")


def penalties(server: Running) -> None:
    """Penalties and biases reach the sampler."""
    _answer(server, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, top_p=0.9)
    params = _params(server)
    assert (params.presence_penalty, params.frequency_penalty, params.top_p) == (0.5, -0.5, 0.9)
    assert params.logit_bias == ((5, -100),)


def limits(server: Running) -> None:
    """The newer name of the limit, and the reason that it gives."""
    reply = _chat(server).create(model="m", messages=USER, max_completion_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def parts(server: Running) -> None:
    """A developer's message, and contents in parts."""
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": " now?"}]},
    ]
    reply = _chat(server).create(model="m", messages=turns, store=False, metadata={"a": "b"}, user="u")
    assert reply.choices[0].message.content == "It rains."
    request = server.served.runner.handles[-1].request  # type: ignore[attr-defined]
    assert server.served.tokenizer.decode(request.prompt_ids).endswith("<system>Be short.<user>What now?:")


def thoughts(server: Running) -> None:
    """Thoughts stand beside the answer and are counted apart."""
    reply = _chat(server).create(
        model="m", messages=USER, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
    )
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("It rains.", "Rain, I think.")
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def text(server: Running) -> None:
    """The older completions: several prompts, token ids, a stream."""
    client = server.client.completions
    assert [c.text for c in client.create(model="m", prompt=["a", "b"], max_tokens=50).choices] == ["It rains."] * 2
    counted: Any = client.create(model="m", prompt=[5, 6, 7], max_tokens=50).usage
    assert counted.prompt_tokens == 3
    assert "".join(c.choices[0].text for c in client.create(model="m", prompt="a", max_tokens=50, stream=True)) == (
        "It rains."
    )


def at_once(server: Running) -> None:
    """The asynchronous client, with several requests on the way."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            create: Any = client.chat.completions.create
            several = (create(model="m", messages=USER) for _ in range(4))
            return [str(reply.choices[0].message.content) for reply in await asyncio.gather(*several)]

    assert asyncio.run(ask()) == ["It rains."] * 4


def too_long(server: Running) -> None:
    """A prompt beyond the context: the code that clients look for."""
    with pytest.raises(openai.BadRequestError) as refused:
        _chat(server).create(model="m", messages=[{"role": "user", "content": "rain " * 5000}])
    assert refused.value.code == "context_length_exceeded"
    assert "tokens" in refused.value.message


def headers(server: Running) -> None:
    """What was passed over is in a header of the raw response."""
    raw = _chat(server).with_raw_response.create(model="m", messages=USER, extra_body={"ttl": 300})
    assert raw.headers["x-hybridkv-ignored"] == "model, ttl"
    assert raw.parse().choices[0].message.content == "It rains."


def responses(server: Running) -> None:
    """OpenAI's newer way to ask."""
    assert server.client.responses.create(model="m", input="Hi").output_text == "It rains."


CALLS = (
    Call("openai", "the list of models", "text", models),
    Call("openai", "an answer", "text", answer),
    Call("openai", "a stream with its counts", "text", streamed),
    Call("openai", "the reader of streams", "text", stream_helper),
    Call("openai", "an answer as a class", "json", parsed),
    Call("openai", "a tool as a class", "city call", parsed_tool),
    Call("openai", "JSON mode", "json", json_mode),
    Call("openai", "a named tool", "call", named_tool),
    Call("openai", "parallel calls", "calls", parallel_calls),
    Call("openai", "one call at most", "calls", one_call),
    Call("openai", "results of tools", "call", tool_results),
    Call("openai", "several answers", "text", several),
    Call("openai", "log probabilities", "text", logprobs),
    Call("openai", "stop texts", "text", stops),
    Call("openai", "penalties and biases", "text", penalties),
    Call("openai", "limits", "text", limits),
    Call("openai", "roles and parts", "text", parts),
    Call("openai", "thoughts", "thought", thoughts),
    Call("openai", "text completions", "text", text),
    Call("openai", "many at once", "text", at_once),
    Call("openai", "too long a prompt", TOO_LONG, too_long),
    Call("openai", "raw responses", "text", headers),
    Call("openai", "the responses API", "text", responses),
)
