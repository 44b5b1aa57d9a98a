"""Calls of real client libraries, one by one: what they send is answered, and what they make of it is right."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import openai
import pytest

from hybridkv.errors import AdmissionError
from tests.server.calls import CALLS, SAYS, TOO_LONG, Call
from tests.server.calls.bodies import BODIES, Listening, write
from tests.server.conftest import Running, Scripter

NOT_OFFERED = {"the responses API": "a second dialect for what chat completions do; 404 names those"}
"""Calls that are known not to come out right, and why."""
NO_ROOM = AdmissionError("5000 prompt tokens and 1 new ones do not fit a context of 2048 tokens", reason="too_large")

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the network for prices otherwise


def test_there_are_46() -> None:
    assert len(CALLS) == 46
    assert len({(call.client, call.what) for call in CALLS}) == 46
    assert len(NOT_OFFERED) == 1


@pytest.fixture(scope="module")
def _garbage_of_calls_alone() -> Iterator[None]:
    """Collecting passes over all that was there before the first call: modules, models, other tests' leftovers."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def heard() -> Iterator[dict[str, list[tuple[str, Any]]]]:
    """What was sent in each call."""
    sent: dict[str, list[tuple[str, Any]]] = {}
    yield sent
    if os.environ.get("WRITE_BODIES"):
        write(sent)


def name_of(call: Call) -> str:
    return f"{CALLS.index(call) + 1}-{call.client}: {call.what}"


def script_of(says: str) -> tuple[Exception, ...]:
    return (NO_ROOM,) if says == TOO_LONG else ()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_garbage_of_calls_alone")
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_calls_of_clients_come_out_right(
    scripted: Scripter, call: Call, heard: dict[str, list[tuple[str, Any]]]
) -> None:
    try:
        version(call.client)
    except PackageNotFoundError:
        pytest.skip(f"{call.client} is not installed")
    listen = partial(Listening, heard=heard.setdefault(name_of(call), []))
    server = scripted(*script_of(call.says), says=SAYS.get(call.says), around=listen, chat=True, n_ctx=2048)
    expected: Any = contextlib.nullcontext()
    if call.what in NOT_OFFERED:
        expected = pytest.raises(openai.NotFoundError, match=r"nothing is at /v1/responses; .* /v1/chat/completions")
    with warnings.catch_warnings(), expected:
        warnings.simplefilter("ignore")  # the libraries' own
        call.check(server)
        gc.collect()  # sockets that a library leaves open are named here, not in a later test


ROWS: list[dict[str, Any]] = json.loads(BODIES.read_text())


def answers_of(reply: Any, *, streamed: bool) -> list[dict[str, Any]]:
    """What a reply's choices say, of pieces the sum."""
    if not streamed:
        return [choice.get("message", choice) for choice in reply.json()["choices"]]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    said: dict[int, dict[str, Any]] = {}
    for choice in (choice for line in lines for choice in json.loads(line)["choices"]):
        whole = said.setdefault(choice["index"], {"text": "", "content": "", "tool_calls": []})
        whole["text"] += choice.get("text", "")
        delta = choice.get("delta", {})
        whole["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                whole["tool_calls"].append(call)
            else:
                whole["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return list(said.values())


def check_answer(says: str, said: dict[str, Any]) -> None:
    content = said.get("content") or said.get("text")
    if says in ("call", "calls", "city call"):
        arguments = [json.loads(call["function"]["arguments"]) for call in said["tool_calls"]]
        assert arguments[0]["city"] == "Paris"
        assert content in (None, "")
    elif says == "json":
        assert json.loads(content or "") == {"city": "Paris", "degrees": 21}
    else:
        assert content
        assert "It rains.".startswith(content)


def test_every_call_has_its_bodies() -> None:
    without = {"the list of models", "the responses API"}
    assert {row["call"] for row in ROWS} == {name_of(call) for call in CALLS if call.what not in without}


@pytest.mark.parametrize("says", [*SAYS, TOO_LONG])
def test_bodies_of_calls_are_answered(scripted: Scripter, says: str) -> None:
    """Without the libraries: what they send, as it was noted."""
    calls = {name_of(call) for call in CALLS if call.says == says}
    server: Running = scripted(*script_of(says), says=SAYS.get(says), chat=True, n_ctx=2048)
    with server.http as http:
        for row in (row for row in ROWS if row["call"] in calls):
            reply = http.post(row["path"], json=row["body"])
            if says == TOO_LONG:
                assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
                continue
            assert reply.status_code == 200, (row["call"], reply.text)
            for said in answers_of(reply, streamed=bool(row["body"].get("stream"))):
                check_answer(says, said)


def test_what_is_not_offered_names_what_is(scripted: Scripter) -> None:
    with scripted(says="x", chat=True).http as http:
        for path in ("/v1/responses", "/api/chat", "/v1/messages"):
            reply = http.post(path, json={"model": "m", "input": "Hi"})
            assert reply.status_code == 404
            assert f"nothing is at {path}" in reply.json()["error"]["message"]
