"""Completions with the real client: texts, streams, reasons to end, log probabilities, counts."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from hybridkv.engine.requests import Event
from tests.server.conftest import Scripter
from tests.server.scripted import Scripted


def ids(tokenizer: Any, text: str) -> list[int]:
    found = list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    assert tokenizer.backend_tokenizer.decode(found) == text
    return found


def pieces(stream: Any) -> list[str]:
    return [choice.text for chunk in stream for choice in chunk.choices]


def test_a_completion(scripted: Scripter, tokenizer: Any) -> None:
    script = ids(tokenizer, " hello 😀 world")
    client = scripted(*script, 0).client
    whole = client.completions.create(model="scripted", prompt="Say", max_tokens=50)
    assert whole.choices[0].text == " hello 😀 world"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(script) + 1  # the end token too
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + len(script) + 1
    stream = pieces(client.completions.create(model="scripted", prompt="Say", max_tokens=50, stream=True))
    assert "".join(stream) == whole.choices[0].text
    assert " 😀" not in stream  # the space and the emoji are tokens of their own
    assert "😀" in stream  # in one piece, though it is four tokens
    short = client.completions.create(model="scripted", prompt="Say", max_tokens=2)
    assert (short.choices[0].text, short.choices[0].finish_reason) == (tokenizer.decode(script[:2]), "length")


def test_an_unfinished_character_at_the_end_is_said(scripted: Scripter, tokenizer: Any) -> None:
    script = ids(tokenizer, "a😀")
    client = scripted(*script).client
    for stream in (False, True):
        answer = client.completions.create(model="scripted", prompt="x", max_tokens=len(script) - 1, stream=stream)
        assert ("".join(pieces(answer)) if stream else answer.choices[0].text) == "a\ufffd"


def test_stop_strings_across_tokens(scripted: Scripter, tokenizer: Any) -> None:
    server = scripted(*ids(tokenizer, "one two\n\nUser: three"), 0)
    for stop, text in (("\n\nUser:", "one two"), (["wo", "zzz"], "one t"), ("one", ""), ("nowhere", None)):
        for stream in (False, True):
            answer = server.client.completions.create(
                model="scripted", prompt="x", max_tokens=50, stop=stop, stream=stream
            )
            said = "".join(pieces(answer)) if stream else answer.choices[0].text
            assert said == ("one two\n\nUser: three" if text is None else text)


def test_a_stop_string_ends_the_sequence_too(scripted: Scripter, tokenizer: Any) -> None:
    server = scripted(*ids(tokenizer, "stop ") * 10, wait_s=0.05)
    server.client.completions.create(model="scripted", prompt="x", max_tokens=50, stop="stop")
    [handle] = server.served.runner.handles
    assert handle.wait(5)
    assert handle.usage.generated_tokens < 4


def test_a_stop_string_ends_one_of_several(scripted: Scripter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence is cancelled at once, and what it says of that is no part of the reply."""
    server = scripted(*ids(tokenizer, "stop ") * 10, wait_s=0.02)
    runner, other = server.served.runner, Scripted(ids(tokenizer, "go ") * 20, wait_s=0.02)
    submit = runner.submit

    def in_turn(*given: Any) -> Any:
        return other.submit(*given) if runner.handles else submit(*given)

    monkeypatch.setattr(runner, "submit", in_turn)
    answer = server.client.completions.create(model="scripted", prompt=["x", "y"], max_tokens=20, stop="stop")
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert answer.choices[0].text == ""
    assert answer.choices[1].text.startswith("go go")
    assert runner.handles[0].usage.generated_tokens < 10


def test_stop_tokens(scripted: Scripter, tokenizer: Any) -> None:
    script = ids(tokenizer, "a b c")
    client = scripted(*script, 0, *script).client
    answer = client.completions.create(
        model="scripted", prompt="x", max_tokens=9, extra_body={"stop_token_ids": [script[1]]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a", "stop")
    on = client.completions.create(model="scripted", prompt="x", max_tokens=7, extra_body={"ignore_eos": True})
    assert (on.choices[0].text, on.choices[0].finish_reason) == ("a b ca b c", "length")


def test_usage_in_a_stream(scripted: Scripter) -> None:
    client = scripted(5, 6, 0).client
    chunks = list(
        client.completions.create(
            model="scripted", prompt=[1, 2, 3], max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_logprobs(scripted: Scripter, tokenizer: Any) -> None:
    script = ids(tokenizer, "a😀x")
    client = scripted(*script, 0).client
    whole = client.completions.create(model="scripted", prompt="x", max_tokens=20, logprobs=2).choices[0].logprobs
    assert whole is not None
    assert whole.token_logprobs == [-0.5] * len(script)
    assert len(whole.top_logprobs[0]) == 2
    assert whole.tokens[-1] == "x"
    assert [token for token in whole.tokens if token.startswith("bytes:")] == list(whole.tokens[1:-1])
    assert whole.text_offset == [0, *[1] * (len(script) - 2), 2]
    streamed: list[Any] = []
    for chunk in client.completions.create(model="scripted", prompt="x", max_tokens=20, logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.tokens
    assert streamed == whole.tokens
    cut = client.completions.create(model="scripted", prompt="x", max_tokens=20, logprobs=0, stop="😀").choices[0]
    assert cut.logprobs is not None
    assert (cut.text, cut.logprobs.tokens, cut.logprobs.top_logprobs) == ("a", ["a"], None)


def test_chat(scripted: Scripter, tokenizer: Any) -> None:
    script = ids(tokenizer, "é x")
    server = scripted(*script, 0, chat=True)
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    whole = server.client.chat.completions.create(
        model="scripted", messages=messages, logprobs=True, top_logprobs=1, max_completion_tokens=20
    )
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "é x", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert bytes(b for t in choice.logprobs.content for b in t.bytes or []) == "é x".encode()
    assert [len(t.top_logprobs) for t in choice.logprobs.content] == [1] * len(script)
    [handle] = server.served.runner.handles
    assert tokenizer.decode(handle.request.prompt_ids) == "<system>Be brief.<user>Hello:"
    chunks = list(server.client.chat.completions.create(model="scripted", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "é x"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.served.runner.handles[-1].request.max_tokens == 64 - len(handle.request.prompt_ids)
    # An answer goes back as the client's own library writes it.
    again = [*messages, choice.message, {"role": "user", "content": "?"}]
    server.client.chat.completions.create(model="scripted", messages=again)
    assert "<assistant>é x<user>?" in tokenizer.decode(server.served.runner.handles[-1].request.prompt_ids)


def test_sampling_reaches_the_engine(scripted: Scripter) -> None:
    server = scripted(5, 0)
    server.client.completions.create(
        model="scripted",
        prompt="x",
        temperature=0.3,
        top_p=0.5,
        seed=7,
        extra_body={"top_k": 3, "min_p": 0.1, "cache_prompt": False, "kv_types": {"type_k": "q8_0", "type_v": "q4_0"}},
    )
    server.client.completions.create(model="scripted", prompt="x")
    asked, default = (handle.request for handle in server.served.runner.handles)
    p = asked.params
    assert (p.temp, p.top_p, p.seed, p.top_k, p.min_p) == (0.3, 0.5, 7, 3, 0.1)
    assert (asked.types.label, asked.reuse) == ("q8_0/q4_0", False)
    p = default.params
    assert (p.temp, p.top_p, p.seed, p.top_k, p.min_p) == (1.0, 1.0, None, 0, 0.0)
    assert (default.types, default.reuse, default.max_tokens, default.logprobs) == (None, True, 16, None)


def test_a_server_has_defaults_of_its_own(scripted: Scripter) -> None:
    own = {"temperature": 0.7, "top_k": 20, "seed": 3, "logit_bias": {"5": 1.0}, "dry_multiplier": 0.8}
    server = scripted(5, 6, 0, chat=True, sampling=own, max_tokens=30)

    def asked(**body: Any) -> Any:
        server.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], **body)
        return server.served.runner.handles[-1].request  # type: ignore[attr-defined]

    request = asked()
    params = request.params
    assert (params.temp, params.top_k, params.seed, params.logit_bias) == (0.7, 20, 3, ((5, 1.0),))
    assert (params.dry_multiplier, params.top_p, request.max_tokens) == (0.8, 1.0, 30)
    assert params.dry_breakers  # llama.cpp's four, as tokens
    request = asked(temperature=0, seed=9, max_tokens=7, extra_body={"top_k": 5, "dry_multiplier": 0})
    assert (request.params.temp, request.params.top_k, request.params.seed, request.max_tokens) == (0, 5, 9, 7)
    assert request.params.dry_multiplier == 0
    server.client.completions.create(model="m", prompt="x")
    assert server.served.runner.handles[-1].request.max_tokens == 30  # type: ignore[attr-defined]


def test_a_failure_of_the_engine_is_an_error(scripted: Scripter) -> None:
    client = scripted(5, Event(finished="error", message="numbers are not finite")).client
    with pytest.raises(openai.InternalServerError, match="numbers are not finite"):
        client.completions.create(model="scripted", prompt="x")
    with pytest.raises(openai.APIError, match="numbers are not finite"):
        list(client.completions.create(model="scripted", prompt="x", stream=True))
