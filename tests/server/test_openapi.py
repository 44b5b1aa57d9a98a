"""The served OpenAPI document is true: schemathesis makes requests from it, and no reply contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

pytest.importorskip("schemathesis", reason="schemathesis is not installed: hybridkv[test-all]")

import jsonschema_rs  # comes with schemathesis
import schemathesis
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.server.conftest import Scripter

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    unsupported_method,
]
EXAMPLES = 12
UNDESCRIBED = (
    *("grammar", "regex", "json_schema", "response_format", "tools", "tool_choice", "suffix", "chat_template_kwargs"),
    *("n", "best_of", "logit_bias"),
)
"""No schema says which grammars there are, what a template or a vocabulary has, or how many prompts `n` is times."""


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_reply_contradicts_the_document(scripted: Scripter, mode: Any) -> None:
    server = scripted(5, 6, 0, chat=True, strict=mode is schemathesis.GenerationMode.NEGATIVE)
    with server.http as http:
        document = http.get("/openapi.json").json()
    for name in ("CompletionRequest", "ChatRequest"):
        for field in UNDESCRIBED:
            document["components"]["schemas"][name]["properties"].pop(field, None)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    statuses: set[int] = set()
    n_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.path.endswith("completions"):
            continue  # nothing in it can be wrong, or it is a model's token that is
        n_operations += 1

        @seed(7)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS).status_code)

        run()
    assert n_operations >= 2
    wanted, unwanted = (200, 400) if mode is schemathesis.GenerationMode.POSITIVE else (400, 200)
    assert wanted in statuses
    assert unwanted not in statuses


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
KV: dict[str, Any] = {"type_k": "q8_0", "type_v": "q4_0"}
BODIES: list[tuple[str, dict[str, Any], bool]] = [
    ("completions", {"prompt": "x", "temperature": 0.0005}, False),
    ("completions", {"prompt": "x", "temperature": 0.001}, True),
    ("completions", {"prompt": "x", "temperature": 0}, True),
    ("completions", {"prompt": "x", "temperature": None}, True),
    ("completions", {"prompt": "x", "temperature": 2.5}, False),
    ("completions", {"prompt": ""}, False),
    ("completions", {"prompt": []}, False),
    ("completions", {"prompt": "x", "seed": 2**63 - 1}, True),
    ("completions", {"prompt": "x", "seed": 2**63}, False),
    ("completions", {"prompt": "x", "seed": -(2**63)}, False),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}}, False),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}, "stream": None}, False),
    ("completions", {"prompt": "x", "stream_options": {"include_usage": True}, "stream": True}, True),
    ("completions", {"prompt": "x", "stream_options": None, "stream": False}, True),
    ("completions", {"prompt": "x", "kv_types": KV}, True),
    ("completions", {"prompt": [3.0, 4], "max_tokens": 2.0, "n": 1.0, "stop_token_ids": [5.0]}, True),
    ("completions", {"prompt": [3.5], "max_tokens": 2}, False),
    ("completions", {"prompt": "x", "max_tokens": 2.5}, False),
    ("completions", {"prompt": "x", "seed": 1e300}, False),
    ("completions", {"prompt": 4.0}, False),
    ("completions", {"prompt": "x", "grammar": 'root ::= "a"', "regex": "a"}, False),
    ("completions", {"prompt": "x", "regex": "a", "json_schema": {}}, False),
    ("completions", {"prompt": "x", "regex": "a", "json_schema": None}, True),
    ("completions", {"prompt": "x", "echo": True, "suffix": "b"}, False),
    ("completions", {"prompt": "x", "echo": True, "suffix": ""}, True),
    ("chat/completions", CHAT | {"top_logprobs": 2}, False),
    ("chat/completions", CHAT | {"top_logprobs": 2, "logprobs": False}, False),
    ("chat/completions", CHAT | {"top_logprobs": 2, "logprobs": True}, True),
    ("chat/completions", CHAT | {"top_logprobs": None, "logprobs": False}, True),
    ("chat/completions", CHAT | {"max_tokens": 2, "max_completion_tokens": 2}, False),
    ("chat/completions", CHAT | {"max_tokens": 2, "max_completion_tokens": None}, True),
    ("chat/completions", CHAT | {"max_completion_tokens": 2}, True),
]


def test_the_document_says_what_is_refused(scripted: Scripter) -> None:
    """Fields that are wrong together, and bounds that a float cannot hold, are in the document too."""
    server = scripted(5, 6, 0, chat=True, strict=True)
    with server.http as http:
        document = http.get("/openapi.json").json()
        answered = [http.post(f"/v1/{path}", json=body).status_code == 200 for path, body, _ in BODIES]
    assert answered == [taken for *_, taken in BODIES]
    valid = {}
    for path in {path for path, *_ in BODIES}:
        request = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = {"$ref": request["$ref"], "components": document["components"]}
        valid[path] = jsonschema_rs.validator_for(schema).is_valid
    for path, body, taken in BODIES:
        assert valid[path](body) is taken, body
        assert not valid[path](body | {"kv_types": KV | {"type_k": "q9_9"}}), body


def test_the_document_names_sessions_and_their_type(scripted: Scripter, tmp_path: Path) -> None:
    server = scripted(5, 6, 0, session_dir=tmp_path)
    with server.http as http:
        document = http.get("/openapi.json").json()
        for verb in ("save", "restore"):
            operation = document["paths"][f"/v1/sessions/{{name}}/{verb}"]["post"]
            (parameter,) = operation["parameters"]
            assert operation["requestBody"]["required"]
            assert list(operation["requestBody"]["content"]) == ["application/json"]
            for session, status in (("a-1", 404), ("a.b", 400), ("a" * 65, 400)):
                assert jsonschema_rs.is_valid(parameter["schema"], session) is (status == 404)
                assert http.post(f"/v1/sessions/{session}/{verb}", json={}).status_code == status
            assert http.post(f"/v1/sessions/a-1/{verb}").status_code == 415
