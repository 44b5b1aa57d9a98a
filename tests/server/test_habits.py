"""Bodies as clients send them, written by hand: each is answered, and what was passed over is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridkv.server.habits import RENAMED, Relaxed
from hybridkv.server.schema import ChatRequest, CompletionRequest
from tests.server.conftest import Running, Scripter

BODIES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data/clients/bodies.json").read_text())
HEADER = "x-hybridkv-ignored"


@pytest.fixture
def server(scripted: Scripter) -> Running:
    return scripted(5, 6, 0, chat=True)


def test_there_are_many_bodies() -> None:
    assert len(BODIES) == 71
    assert sum("refused" in row for row in BODIES) == 1
    assert len({row["client"] for row in BODIES}) > 30


def ask(server: Running, path: str, body: dict[str, Any]) -> Any:
    with server.http as http:
        return http.post(path, json=body)


def test_bodies_of_real_clients(server: Running) -> None:
    """All in one server: what one client sends must not matter to the next."""
    wrong = []
    for row in BODIES:
        reply = ask(server, row["path"], row["body"])
        said = set(filter(None, reply.headers.get(HEADER, "").split(", "))) - {"model"}
        status = 400 if "refused" in row else 200
        fine = reply.status_code == status and said == set(row["ignored"]) and row.get("refused", "") in reply.text
        if not fine:
            wrong.append((row["client"], row["what"], reply.status_code, reply.text[:300], sorted(said)))
    assert not wrong, json.dumps(wrong, indent=1)


def test_strict_refuses_what_has_no_meaning(scripted: Scripter) -> None:
    server = scripted(5, 6, 0, chat=True, strict=True)
    statuses = {}
    for row in BODIES:
        if "draft_model" in row["body"] or "num_ctx" in row["body"] or row["body"].get("max_tokens") == -1:
            reply = ask(server, row["path"], row["body"] | {"model": "scripted"})
            statuses[row["what"]] = reply.status_code
            assert HEADER not in reply.headers
    assert set(statuses.values()) == {400}
    assert len(statuses) == 4


def relaxed(body: dict[str, Any], *, chat: bool = True) -> tuple[dict[str, Any], list[str]]:
    found = Relaxed(body, chat=chat, model="served")
    (ChatRequest if chat else CompletionRequest).model_validate(found.body | ({} if chat else {"prompt": "x"}))
    return found.body, list(found.ignored)


USER = [{"role": "user", "content": "x"}]
VALUES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": -1}, {"until_full": True}),
    ({"n_predict": -1}, {"until_full": True}),
    ({"max_completion_tokens": -1}, {"until_full": True}),
    ({"max_tokens": 0}, {}),
    ({"max_tokens": None}, {}),
    ({"max_tokens": "7"}, {"max_tokens": 7}),
    ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_completion_tokens": 6}),
    ({"temperature": 0.0001}, {"temperature": 0}),
    ({"temperature": -1}, {"temperature": 0}),
    ({"top_k": -1}, {}),
    ({"top_k": 0}, {}),
    ({"top_p": 0}, {"top_p": 1e-9}),
    ({"seed": -1}, {}),
    ({"seed": 0}, {"seed": 0}),
    ({"stop": ""}, {}),
    ({"stop": ["", "a"]}, {"stop": ["a"]}),
    ({"stop": []}, {}),
    ({"model": ""}, {}),
    ({"model": "served"}, {}),
    ({"logit_bias": []}, {}),
    ({"logit_bias": [[5, 1.5], [6, False]]}, {"logit_bias": {"5": 1.5, "6": -1e9}}),
    ({"top_logprobs": 0, "logprobs": False}, {"logprobs": False}),
    ({"logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"response_format": {"type": "text"}}, {}),
    ({"guided_choice": ["a.b", "c"]}, {"regex": r"a\.b|c"}),
    ({"structured_outputs": {"json": {"type": "object"}}}, {"json_schema": {"type": "object"}}),
    ({"think": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
    ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
    ({"reasoning": {"effort": "low", "max_tokens": 9}}, {"reasoning_effort": "low", "reasoning_budget": 9}),
    ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
]


@pytest.mark.parametrize(("body", "ours"), VALUES, ids=lambda value: json.dumps(value)[:50])
def test_values_mean_what_they_mean_elsewhere(body: dict[str, Any], ours: dict[str, Any]) -> None:
    found, ignored = relaxed({"messages": USER, **body})
    assert found == {"messages": USER, **ours}
    assert ignored in ([], ["max_tokens"])


def test_a_completion_of_no_tokens_is_one() -> None:
    assert relaxed({"max_tokens": 0}, chat=False) == ({"max_tokens": 0}, [])
    assert relaxed({"logprobs": True}, chat=False) == ({"logprobs": 1}, [])
    assert relaxed({"logprobs": False}, chat=False) == ({}, [])
    assert relaxed({"best_of": 4, "n": 2}, chat=False) == ({"n": 2}, ["best_of"])


@pytest.mark.parametrize("theirs", RENAMED)
def test_our_name_wins(theirs: str) -> None:
    ours = RENAMED[theirs]
    found = Relaxed({theirs: 5, ours: 6}, chat=True, model="served")
    assert found.body == {ours: 6}
    assert list(found.ignored) == [theirs]
    assert Relaxed({theirs: 5}, chat=True, model="served").body == {ours: 5}


def test_what_was_passed_over_is_said_once_for_each_kind(scripted: Scripter) -> None:
    said: list[str] = []
    server = scripted(5, 6, 0, notify=said.append)
    for _ in range(3):
        assert (
            ask(server, "/v1/completions", {"prompt": "x", "foo": 1, "b\xe4r\r\n": 2}).headers[HEADER] == "foo, b?r??"
        )
    ask(server, "/v1/completions", {"prompt": "x", "foo": None})
    assert said == ["passed over in a request: foo, b?r??"]


def test_a_limit_beyond_the_context_is_the_context(scripted: Scripter) -> None:
    server = scripted(5, 6, 0, chat=True)
    for body in ({"max_tokens": 100_000}, {"max_tokens": -1}, {"n_predict": 2**30}):
        reply = ask(server, "/v1/chat/completions", {"messages": USER, **body}).json()
        request = server.served.runner.handles[-1].request  # type: ignore[attr-defined]
        assert len(request.prompt_ids) + request.max_tokens == server.served.n_ctx, body
        assert reply["choices"][0]["finish_reason"] == "stop"


ODD: list[Any] = [
    {},
    [],
    1,
    -1.5,
    "x",
    "",
    True,
    False,
    [{}],
    [[]],
    [None],
    {"type": {}},
    {"type": []},
    {"a": None},
    2**70,
]
EVERYTHING: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "z"}]},
        {
            "role": "assistant",
            "reasoning": "r",
            "function_call": {"name": "f", "arguments": "{}"},
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": {"a": 1}},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "structured_outputs": {"json": {"a": 1}, "choice": ["a"]},
    "guided_choice": ["a"],
    "stop": ["a", ""],
    "logit_bias": [[1, False], ["a", 2]],
    "chat_template_kwargs": {"enable_thinking": True},
    "thinking": {"type": "enabled", "budget_tokens": 3},
    "reasoning": {"effort": "low", "enabled": True, "max_tokens": 3},
    "stream_options": {"include_usage": True},
    **dict.fromkeys(RENAMED, 1),
    **{"stream": True, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 4, "seed": -1, "top_k": -1},
}


def with_each_part_odd(body: Any) -> Iterator[Any]:
    """The body with one of its parts, however deep, another one."""
    for place in body if isinstance(body, dict) else range(len(body)):
        for value in ODD:
            yield body | {place: value} if isinstance(body, dict) else [*body[:place], value, *body[place + 1 :]]
        if isinstance(body[place], (dict, list)):
            for part in with_each_part_odd(body[place]):
                yield body | {place: part} if isinstance(body, dict) else [*body[:place], part, *body[place + 1 :]]


@pytest.mark.parametrize("chat", [True, False])
def test_no_body_is_too_odd_to_be_put_into_our_words(chat: bool) -> None:
    n_bodies = 0
    for body in with_each_part_odd(EVERYTHING):
        assert isinstance(Relaxed(body, chat=chat, model="m").body, dict)
        n_bodies += 1
    assert n_bodies > 1000


def test_a_part_of_no_kind_is_refused(server: Running) -> None:
    reply = ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": {}, "text": ""}]}]})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
