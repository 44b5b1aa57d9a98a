"""Grammars and thinking budgets steer a real vocabulary; hostile grammars are refused in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import pytest
import torch

from hybridkv.engine.sampling import Sampler, SamplingParams
from hybridkv.errors import GuardError, UsageError
from hybridkv.server import grammar as grammars
from hybridkv.server.channels import Channels, Reading
from hybridkv.server.dialects import DIALECTS, Dialect
from hybridkv.server.grammar import Grammar, Grammars, Matcher, of_calls, of_schema
from hybridkv.server.steering import Steer, Thinking
from hybridkv.text.detokenize import token_bytes
from tests.chat_models import CHATML, byte_level

pytest.importorskip("llguidance", reason="llguidance is not installed: no structured output")

WORDS = ("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]")
TOKENIZER = byte_level(CHATML, control=("<bos>", "<|im_start|>", "<|im_end|>", *WORDS))
N_VOCAB = len(TOKENIZER)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def bytes_of(token: int) -> bytes:
    return token_bytes(TOKENIZER, token)


GRAMMARS = Grammars(TOKENIZER, N_VOCAB, [END])


@pytest.fixture(autouse=True)
def _slow_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_SECONDS", 300)


def matcher(grammar: Grammar) -> Matcher:
    return asyncio.run(GRAMMARS.matcher(grammar))


def generated(steer: Steer, seed: int, most: int = 400) -> tuple[str, bool]:
    """What comes of logits that say nothing; whether it ended by itself."""
    sampler, text = Sampler(SamplingParams(temp=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed), steer), b""
    for _ in range(most):
        token = int(sampler.draw(torch.zeros(1, N_VOCAB)))
        if token == END:
            return text.decode(errors="replace"), True
        text += bytes_of(token)
    return text.decode(errors="replace"), False


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(8))
def test_answers_have_their_form(seed: int) -> None:
    text, ended = generated(Steer(bytes_of, None, matcher(of_schema(PERSON))), seed)
    assert ended
    person = json.loads(text)
    assert set(person) == {"name", "age"}
    assert len(person["name"]) <= 5
    assert 0 <= person["age"] <= 150
    text, ended = generated(Steer(bytes_of, None, matcher(Grammar("regex", "[0-9]{3}-(a|b){2}"))), seed)
    assert re.fullmatch("[0-9]{3}-(a|b){2}", text)
    assert ended
    text, _ = generated(Steer(bytes_of, None, matcher(Grammar("gbnf", 'root ::= "yes" | "no"'))), seed)
    assert text in ("yes", "no")


TOOLS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["x"]},
    "g": {"type": "object", "properties": {"c": {"enum": ["r", "g"]}}, "required": ["c"]},
}


def word(text: str) -> str:
    index = TOKENIZER.get_vocab().get(text)
    return json.dumps(text) if index is None else f"<[{index}]>"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_one(dialect: Dialect, seed: int) -> None:
    """Whatever the model says: the grammar makes a call of it that the same dialect's reader reads."""
    steer = Steer(bytes_of, None, matcher(of_calls(dialect, TOOLS, word, several=False)))
    text, ended = generated(steer, seed, most=3000)
    assert ended, text[:300]
    channels = Channels(Reading(dialect=dialect, tools=TOOLS))
    calls = [*channels.push(text).calls, *channels.close().calls]
    assert len({call.index for call in calls}) == 1, text
    arguments = json.loads("".join(call.arguments for call in calls))
    assert set(arguments) == ({"x"} if calls[0].name == "f" else {"c"})


def thinking(*, opened: bool, may_open: bool = False, budget: int | None = None) -> Thinking:
    return Thinking(
        "<think>", "</think>", opened, may_open, ids_of("<think>"), ids_of("</think>"), ids_of("\n"), budget
    )


def test_a_grammar_begins_where_thoughts_end() -> None:
    steer = Steer(bytes_of, thinking(opened=True), matcher(Grammar("regex", "ok")))
    for token in (*ids_of("anything at all </thi"), *ids_of("</think>")):
        assert steer.allowed() is None
        steer.accept(token)
    assert steer.n_thought == len(ids_of("anything at all </thi")) + 1
    assert {bytes_of(int(i)) for i in steer.allowed()} == {b"o", b"\n"}
    steer.accept(ids_of("\n")[0])
    assert {bytes_of(int(i)) for i in steer.allowed()} == {b"o"}
    for token in ids_of("ok"):
        steer.accept(token)
    assert steer.allowed().tolist() == [END]


def test_thoughts_may_begin_where_a_grammar_waits() -> None:
    steer = Steer(bytes_of, thinking(opened=False, may_open=True), matcher(Grammar("regex", "ok")))
    assert {bytes_of(int(i)) for i in steer.allowed()} == {b"o", b"<think>"}
    steer.accept(ids_of("<think>")[0])
    assert steer.allowed() is None
    steer = Steer(bytes_of, thinking(opened=False, may_open=True), matcher(Grammar("regex", "ok")))
    steer.accept(ids_of("o")[0])
    assert {bytes_of(int(i)) for i in steer.allowed()} == {b"k"}


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_closes_thoughts(budget: int) -> None:
    steer = Steer(bytes_of, thinking(opened=True, budget=budget), None)
    text, _ = generated(steer, 3, most=40)
    assert "</think>" in text
    assert steer.n_thought == budget + 1  # with the word that closes them
    later = Steer(bytes_of, thinking(opened=False, may_open=True, budget=2), None)
    for token in (*ids_of("<think>"), *ids_of("ab")):
        assert later.allowed() is None
        later.accept(token)
    assert later.allowed().tolist() == list(ids_of("</think>"))
    free = Steer(bytes_of, thinking(opened=False, may_open=True, budget=0), None)
    for token in ids_of("no thoughts here <think>"):
        assert free.allowed() is None
        free.accept(token)


HOSTILE: list[tuple[Grammar, str]] = [
    (Grammar("regex", "("), "unclosed group"),
    (Grammar("json_schema", '{"type": "potato"}'), "Invalid type"),
    (Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'), "Default retriever does not fetch"),
    (Grammar("gbnf", "root ::= missing"), "not found"),
    (Grammar("gbnf", "root ::= " + "(" * 20000), "."),
]
HUGE = (
    Grammar("regex", "(a{1000}){1000}"),
    Grammar("regex", "(((a{100}){100}){100}){100}"),
    Grammar("json_schema", '{"pattern": "^(a{1000}){1000}$", "type": "string"}'),
    Grammar("json_schema", json.dumps({"type": "string", "minLength": 10**9})),
    Grammar("json_schema", json.dumps({"enum": [f"{n:x}" for n in range(20_000)]})),
    Grammar(
        "json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}'
    ),
)


@pytest.mark.parametrize(("grammar", "message"), HOSTILE, ids=lambda value: str(value)[:40])
def test_hostile_grammars_are_refused_in_time(grammar: Grammar, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_CPU_SECONDS", 3)
    start = time.process_time()
    with pytest.raises(UsageError, match=message):
        matcher(grammar)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "grammar",
    [HUGE[0], *(pytest.param(grammar, marks=pytest.mark.slow) for grammar in HUGE[1:])],
    ids=lambda value: str(value)[:40],
)
def test_huge_grammars_are_built_in_time_or_refused(grammar: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_CPU_SECONDS", 3)
    start = time.process_time()
    with contextlib.suppress(UsageError):
        assert len(matcher(grammar).allowed())
    assert time.process_time() - start < 10


def test_a_schema_has_a_size() -> None:
    with pytest.raises(UsageError, match=r"a JSON schema of 3[0-9]{5} characters; allowed: 262144"):
        of_schema({"enum": ["x" * 300_000]})


def test_a_grammar_without_a_token_says_so() -> None:
    """A vocabulary may lack what a grammar asks for: no silent end."""
    found = matcher(Grammar("regex", "ab"))
    found.accept(ids_of("b")[0])
    with pytest.raises(GuardError, match="the grammar cannot continue"):
        found.allowed()
