"""Whatever comes in, what goes out is one error in OpenAI's shape that says what is allowed."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any

import openai
import pytest

from hybridkv.errors import AdmissionError
from hybridkv.server import gate
from hybridkv.server.gate import TAKES_BODY, GateOptions
from tests.server.conftest import Running, Scripter

JSON = {"Content-Type": "application/json"}


def post(server: Running, body: bytes | str | dict[str, Any], path: str = "/v1/completions", **headers: str) -> Any:
    content = json.dumps(body) if isinstance(body, dict) else body
    with server.http as client:
        return client.post(path, content=content, headers=JSON | headers)


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code", "numbers"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.fixture
def server(scripted: Scripter) -> Running:
    return scripted(5, 6, 0, chat=True, strict=True)


WRONG: tuple[tuple[str, str], ...] = (
    ("{", "the body is not valid JSON"),
    ("", "Field required|not valid JSON"),
    ("\xff\xfe", "not valid JSON|parsing"),
    ("[]", "valid dictionary"),
    ("nul", "the body is not valid JSON"),
    ("[" * 20000 + "]" * 20000, "."),
    ('{"prompt": ' + "9" * 5000 + "}", "."),
    ("{}", "prompt: Field required"),
    ('{"prompt": 5}', "prompt"),
    ('{"prompt": [1, "a"]}', "prompt"),
    ('{"prompt": [-1]}', "prompt"),
    ('{"prompt": [8192]}', "prompt: 8192; this model's tokens are 0 to 8191"),
    ('{"prompt": [1e400]}', "prompt"),
    ('{"prompt": ["a", 5]}', "prompt"),
    (f'{{"prompt": {json.dumps(["x"] * 40)}, "n": 2}}', "80 answers to 40 prompts; allowed: 64"),
    ('{"prompt": []}', "the prompt has no tokens"),
    ('{"prompt": ""}', "the prompt has no tokens"),
    ('{"prompt": "a\\ud800"}', "prompt: character 1 is half of a surrogate pair"),
    ('{"prompt": "x", "\\ud800": 1}', "unicode string"),
    ('{"prompt": "x", "max_tokens": "5"}', "max_tokens: Input should be a valid integer"),
    ('{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    ('{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
    ('{"prompt": "x", "max_tokens": true}', "max_tokens"),
    ('{"prompt": "x", "temperature": 3}', "temperature"),
    ('{"prompt": "x", "temperature": NaN}', "temperature"),
    ('{"prompt": "x", "temperature": 1e-9}', "temperature: allowed: 0 .greedy., or 0.001 to 2"),
    ('{"prompt": "x", "top_p": 0}', "top_p"),
    ('{"prompt": "x", "n": 0}', "n: Input should be greater than or equal to 1"),
    ('{"prompt": "x", "n": 65}', "n: Input should be less than or equal to 64"),
    ('{"prompt": "x", "stop": [""]}', "stop"),
    ('{"prompt": "x", "stop": [5]}', "stop"),
    ('{"prompt": "x", "logprobs": 21}', "logprobs"),
    ('{"prompt": "x", "seed": 1e30}', "seed"),
    ('{"prompt": "x", "echo": true, "suffix": "y"}', "echo and suffix were given together"),
    ('{"prompt": "x", "best_of": 3}', "best_of 3; allowed: n, 1"),
    ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias"),
    ('{"prompt": "x", "logit_bias": {"5": true}}', "logit_bias"),
    ('{"prompt": "x", "frequency_penalty": 1000}', "frequency_penalty"),
    ('{"prompt": "x", "repeat_penalty": 0}', "repeat_penalty"),
    ('{"prompt": "x", "suffix": "y"}', "suffix: this model's vocabulary has no words for filling in"),
    ('{"prompt": "x", "grammar": "x", "regex": "y"}', "grammar and regex were given together"),
    ('{"prompt": "x", "modalities": ["audio"]}', "modalities is not offered by this server; allowed: null"),
    ('{"prompt": "x", "stream_options": {"include_usage": true}}', "stream_options needs stream: true"),
    ('{"prompt": "x", "temprature": 1}', "temprature: no such field"),
    ('{"prompt": "x", "kv_types": {"type_k": 4, "type_v": "q4_0"}}', "kv_types.type_k"),
)
WRONG_CHATS: tuple[tuple[str, str], ...] = (
    ('{"messages": []}', "messages"),
    ('{"messages": [{"role": "user"}]}', "messages.0: content: Field required"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages.0: content: Field required"),
    ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens"),
    ('{"messages": [{"role": "king", "content": "x"}]}', "messages.0.role"),
    ('{"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "type 'image_url'; allowed: text"),
    ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "messages.0.content"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', "tools.0.function"),
    ('{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', "tool_choice required needs tools"),
    (
        '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": 1}}',
        "no variable of a",
    ),
    ('{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}', "top_logprobs needs logprobs: true"),
    ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "max_completion_tokens": 5}', "together"),
    (
        '{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}',
        "needs json_schema",
    ),
)


def test_wrong_bodies(server: Running) -> None:
    for path, cases in (("/v1/completions", WRONG), ("/v1/chat/completions", WRONG_CHATS)):
        for body, message in cases:
            error = error_of(post(server, body.encode("latin-1"), path), 400)
            assert re.search(message, error["message"]), (body[:80], error)
            assert error["type"] == "invalid_request_error"
    assert not server.served.runner.handles


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    neutral = {"n": 1, "echo": False, "best_of": 1, "logit_bias": {}, "frequency_penalty": 0, "user": "me"}
    assert post(server, {"prompt": "a\u0000b 😀", "stop": None, **neutral}).status_code == 200
    assert post(server, {"prompt": ["x"]}).status_code == 200
    assert post(server, {"prompt": [[5, 6]]}).status_code == 200


def test_methods_that_are_not_declared(server: Running) -> None:
    """Whatever the body and its type: what a path takes is said first."""
    every = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
    with server.http as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path, operations in paths.items():
            declared = {method.upper() for method in operations}
            assert ("POST" in declared) == (TAKES_BODY.fullmatch(path.replace("{name}", "a")) is not None), path
            for method in set(every) - declared:
                for asked in ({}, {"json": {}}, {"content": b"x", "headers": {"Content-Type": "text/plain"}}):
                    reply = client.request(method, path.replace("{name}", "a"), **asked)
                    assert (reply.status_code, reply.headers["Allow"]) == (405, ", ".join(declared)), (method, path)
                    if method != "HEAD":
                        assert reply.json()["error"]["message"] == "Method Not Allowed"
        for asked in ({}, {"json": {}}):
            error_of(client.post("/nowhere", **asked), 404)


def test_other_ways_to_be_wrong(server: Running) -> None:
    with server.http as client:
        form = client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"})
        assert "text/plain" in error_of(form, 415)["message"]
        error_of(client.get("/nowhere"), 404)
        error_of(client.get("/v1/completions"), 405)
        error_of(client.get("/v1/models/other"), 404)
    error = error_of(post(server, {"prompt": "x", "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-4'; this server has 'scripted'" in error["message"]


def test_a_model_without_a_template(scripted: Scripter) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        scripted(5).client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x"}])


def test_bodies_that_are_too_large(scripted: Scripter) -> None:
    server = scripted(5, 0, options=GateOptions(max_body_bytes=10_000))
    assert post(server, {"prompt": [5] * 10, "user": "u" * 500}).status_code == 200
    for body in (b"x" * 10_001, b"x" * 50_000_000):
        start = time.perf_counter()
        error = error_of(post(server, body), 413)
        assert error["code"] == "body_too_large"
        assert "allowed: 10000 bytes (--max-body)" in error["message"]
        assert time.perf_counter() - start < 10

    def pieces() -> Any:
        for _ in range(1000):
            yield b"x" * 1000

    with server.http as client:
        response = client.post("/v1/completions", content=pieces(), headers=JSON)
    assert "more than 10000 bytes" in error_of(response, 413)["message"]


def test_a_body_that_does_not_come(scripted: Scripter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(gate, "_LINGER_SECONDS", 0.1)
    server = scripted(5)
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            "Content-Length: 9",
            "",
            "{",
        )
        raw.sendall("\r\n".join(head).encode())
        raw.settimeout(5)
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_refusals_of_the_scheduler(scripted: Scripter) -> None:
    large = AdmissionError(
        "9 tokens take 900 bytes", reason="too_large", planned_bytes=900, budget_bytes=100, n_tokens=9, most_tokens=1
    )
    error = error_of(post(scripted(large), {"prompt": "x"}), 400)
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert error["numbers"] == {"n_tokens": 9, "most_tokens": 1, "planned_bytes": 900, "budget_bytes": 100}
    full = post(scripted(AdmissionError("64 requests wait", reason="queue_full")), {"prompt": "x"})
    assert error_of(full, 429)["type"] == "rate_limit_error"
    assert int(full.headers["Retry-After"]) >= 1
    closed = post(scripted(AdmissionError("shutting down", reason="closed")), {"prompt": "x"})
    assert error_of(closed, 503)["type"] == "server_error"
    with pytest.raises(openai.RateLimitError):
        scripted(AdmissionError("x", reason="queue_full")).client.completions.create(model="scripted", prompt="x")


def test_a_request_that_is_refused_half_way_leaves_nothing_running(
    scripted: Scripter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts the second finds no place; nobody would wait for the first one's answer."""
    server = scripted(*[5] * 500, wait_s=0.1)
    runner = server.served.runner
    submit = runner.submit

    def one_place(*given: Any) -> Any:
        if runner.handles:
            raise AdmissionError("1 request runs", reason="queue_full")
        return submit(*given)

    monkeypatch.setattr(runner, "submit", one_place)
    refused = post(server, {"prompt": ["x", "y"], "max_tokens": 500})
    assert error_of(refused, 429)["code"] == "queue_full"
    assert [handle.cancelled for handle in runner.handles] == [True]


def test_faults_of_the_program_are_not_told(scripted: Scripter, capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of(post(scripted(RuntimeError("secret")), {"prompt": "x"}), 500)
    assert "secret" not in error["message"]
    log, deadline = "", time.monotonic() + 5
    while "secret" not in log and time.monotonic() < deadline:
        time.sleep(0.01)
        log += capfd.readouterr().err
    assert "RuntimeError: secret" in log


def test_keys(scripted: Scripter) -> None:
    server = scripted(5, 0, options=GateOptions(api_keys=("s3cret", "other")))
    server.key = "s3cret"
    assert server.client.models.list().data[0].id == "scripted"
    server.key = "wrong"
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()
    with server.http as client:
        for path in ("/v1/models", "/v1/status", "/metrics", "/v1/nowhere"):
            for value in ("", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "s3cret", "Bearer \xff"):
                response = client.get(path, headers={b"Authorization": value.encode("latin-1")} if value else {})
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200
    error_of(post(server, b"x" * 20), 401)
    assert post(server, {"prompt": "x"}, Authorization="bearer other").status_code == 200


def test_foreign_hosts(scripted: Scripter) -> None:
    server = scripted(5, 0, options=GateOptions(local_only=True))
    with server.http as client:
        for host in ("localhost:80", "127.0.0.1", "[::1]:8080", "LOCALHOST"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "[fe80::1]"):
            assert error_of(client.get("/", headers={"Host": host}), 403)["code"] == "foreign_host"


def test_too_many_at_once(scripted: Scripter) -> None:
    server = scripted(*[5] * 500, wait_s=0.1, options=GateOptions(max_in_flight=1))
    body = {"prompt": "x", "stream": True, "max_tokens": 500}
    with server.http as client, client.stream("POST", "/v1/completions", json=body):
        busy = post(server, {"prompt": "x"})
    assert error_of(busy, 429)["code"] == "queue_full"
    assert int(busy.headers["Retry-After"]) >= 1
    deadline = time.monotonic() + 20
    while (later := post(server, {"prompt": "x", "max_tokens": 1})).status_code == 429:  # the stream's client has left
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert later.status_code == 200


def test_metrics_count_replies_by_route(server: Running) -> None:
    post(server, {"prompt": "x"})
    post(server, "{")
    with server.http as client:
        client.get("/a/path/of/somebody")
        text = client.get("/metrics").text
    assert 'hybridkv_http_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'hybridkv_http_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'hybridkv_http_requests_total{path="other",status="404"} 1.0' in text
    assert "hybridkv_first_token_seconds_count 1.0" in text
    assert "hybridkv_next_token_seconds_count 2.0" in text
    assert "hybridkv_kv_bytes 4096.0" in text
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)


def test_the_stream_as_it_is_sent(server: Running) -> None:
    body = {"prompt": "x", "stream": True}
    with server.http as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith(("data: ", ":")) for line in lines)
