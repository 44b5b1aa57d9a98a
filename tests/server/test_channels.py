"""Thoughts, calls and content come apart the same however the text is cut, and nothing is lost or said twice."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from hybridkv.server.channels import Channels, Reading, opens_thoughts, thoughts_of
from hybridkv.server.dialects import DIALECTS, HERMES, Dialect, dialect_of

THINK = ("<think>", "</think>")
TOOLS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "string"}}},
    "g": {"type": "object", "properties": {}},
}


def read(text: str, cuts: list[int], **reading: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, thoughts and calls of a text that comes in pieces."""
    channels = Channels(Reading(**reading))
    content, reasoning, names, arguments, ids = "", "", {}, {}, set()
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for out in (*(channels.push(piece) for piece in pieces), channels.close()):
        content, reasoning = content + out.content, reasoning + out.reasoning
        for call in out.calls:
            if call.name is not None:
                assert call.index not in names
                names[call.index] = call.name
                assert call.id is not None
                ids.add(call.id)
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert len(ids) == len(names)
    return content, reasoning, [(names[index], arguments[index]) for index in sorted(names)]


def same_however_cut(text: str, **reading: Any) -> tuple[str, str, list[tuple[str, str]]]:
    whole = read(text, [], **reading)
    chance = random.Random(7)
    for n in (1, 2, 5):
        for _ in range(20):
            cuts = sorted(chance.randrange(len(text) + 1) for _ in range(n))
            assert read(text, cuts, **reading) == whole, cuts
    assert read(text, list(range(1, len(text))), **reading) == whole
    return whole


THOUGHTS: list[tuple[str, bool, str, str]] = [
    ("Hello", False, "Hello", ""),
    ("<think>\nhm, 2\n</think>\n\nHello", False, "Hello", "hm, 2"),
    ("  \n<think>hm</think>Hello", False, "Hello", "hm"),
    ("hm\n</think>\n\nHello", True, "Hello", "hm"),
    ("hm, and then", True, "", "hm, and then"),
    ("<think>hm, and th", False, "", "hm, and th"),
    ("<think>\n\n</think>\n\nHello", False, "Hello", ""),
    ("</think>Hello", True, "Hello", ""),
    ("Write <think> to think </think>.", False, "Write <think> to think </think>.", ""),
    ("<thin ice", False, "<thin ice", ""),
    ("a </thi b</think>c", True, "c", "a </thi b"),
    ("", True, "", ""),
    ("   ", False, "   ", ""),
]


@pytest.mark.parametrize(("text", "opened", "content", "reasoning"), THOUGHTS)
def test_thoughts(text: str, opened: bool, content: str, reasoning: str) -> None:
    assert same_however_cut(text, thoughts=THINK, opened=opened) == (content, reasoning, [])
    assert same_however_cut(text) == (text, "", [])


def test_thoughts_may_stay_in_the_content() -> None:
    text = "<think>hm</think>\n\nHello"
    content, reasoning, _ = same_however_cut(text, thoughts=THINK, keeps_thoughts=True)
    assert (content, reasoning) == ("<think>hm</think>Hello", "hm")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_dialect(dialect: Dialect) -> None:
    asked: dict[str, Any] = {"dialect": dialect, "tools": TOOLS}
    content, _, calls = same_however_cut(dialect.example, **asked)
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"x": 1})]
    if not dialect.bare:
        content, reasoning, calls = same_however_cut(
            f"<think>hm</think>Let me see.\n{dialect.example}", thoughts=THINK, **asked
        )
        assert (content, reasoning, len(calls)) == ("Let me see.", "hm", 1)
    assert read("It is < 1.", [], **asked)[0] == "It is < 1."
    assert dialect_of(f"xx {dialect.signs[0]} xx") is dialect


CALLS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\n',
     [("f", {"x": 1}), ("g", {})]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', [("f", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', [("g", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>', [("f", {"x": 2})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"y": "a } \\" ] {"}}</tool_call>', [("f", {"y": 'a } " ] {'})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})]),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
     [("f", {}), ("g", {})]),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}</tool_call>',
     [("f", {"x": 1})]),
    ("qwen3-coder", "<tool_call>\n<function=f>\n<parameter=x>\n12\n</parameter>\n<parameter=y>\na\n\nb <c>\n"
     "</parameter>\n</function>\n</tool_call>", [("f", {"x": 12, "y": "a\n\nb <c>"})]),
    ("qwen3-coder", "<tool_call><function=g></function></tool_call><tool_call><function=f><parameter=y>7</parameter>"
     "</function></tool_call>", [("g", {}), ("f", {"y": "7"})]),
    ("lfm2", '<|tool_call_start|>[f(x=-3, y="a, b)"), g()]<|tool_call_end|>',
     [("f", {"x": -3, "y": "a, b)"}), ("g", {})]),
    ("lfm2", "<|tool_call_start|>[f(x=[1, {'a': true}], y=null)]<|tool_call_end|>Done",
     [("f", {"x": [1, {"a": True}], "y": None})]),
    ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {"x": 1}}]<|tool_call_end|>', [("f", {"x": 1})]),
    ("granite", '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
     [("f", {"x": 1}), ("g", {})]),
    ("llama3", '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', [("f", {"x": 1}), ("g", {})]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}', [("f", {"x": 1})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "calls"), CALLS)
def test_calls(name: str, text: str, calls: list[tuple[str, Any]]) -> None:
    dialect = next(d for d in DIALECTS if d.name == name)
    content, _, found = same_however_cut(text, dialect=dialect, tools=TOOLS)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert content == ("Done" if text.endswith("Done") else "")


NO_CALLS: list[tuple[str, str]] = [
    ("hermes", "<tool_call>nothing</tool_call> then"),
    ("hermes", '<tool_call>{"name": 5}</tool_call>'),
    ("llama3", '{"answer": 42}'),
    ("llama3", '{"name": "unknown", "parameters": {}}'),
    ("llama3", '{"name": "f"'),
    ("lfm2", "<|tool_call_start|>[__import__('os').system('x')]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[f(*a, **b)]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>" + "[" * 3000 + "<|tool_call_end|>"),
    ("mistral", "[TOOL_CALLS]what?"),
]


@pytest.mark.parametrize(("name", "text"), NO_CALLS)
def test_what_cannot_be_read_is_text(name: str, text: str) -> None:
    dialect = next(d for d in DIALECTS if d.name == name)
    content, _, calls = read(text, [], dialect=dialect, tools=TOOLS)
    assert (content, calls) == (text, [])


def test_a_call_that_the_end_cuts_off_stays_one() -> None:
    """Its beginning may have been streamed already; the reason to finish says `length`."""
    for dialect in DIALECTS[:1]:
        text = "<tool_call><function=f><parameter=x>1</parameter><parameter=y>2"
        assert read(text, [], dialect=dialect, tools=TOOLS) == ("", "", [("f", '{"x": 1')])


def test_arguments_are_streamed() -> None:
    channels = Channels(Reading(dialect=HERMES, tools=TOOLS))
    said = [
        channels.push(piece).calls for piece in ('<tool_call>{"name": "f", "arguments": {"y": "a', "b", 'c"}}</tool')
    ]
    assert [[call.arguments for call in calls] for calls in said] == [['{"y": "a'], ["b"], ['c"}']]


def test_one_call_ends_the_answer() -> None:
    channels = Channels(Reading(dialect=HERMES, tools=TOOLS, one_call=True))
    out = channels.push(HERMES.example + "\n" + HERMES.example + "more")
    assert (len(out.calls), out.content, channels.ended) == (1, "", True)
    assert channels.push("more").content == ""


def test_words_come_from_the_template() -> None:
    assert thoughts_of("x [THINK] y") == ("[THINK]", "[/THINK]")
    assert thoughts_of("nothing") == THINK
    assert opens_thoughts("x <think>\n", THINK)
    assert not opens_thoughts("x <think>\n\n</think>\n\n", THINK)
    assert not opens_thoughts("x <think> y", THINK)
