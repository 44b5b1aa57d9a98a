"""Messages and tools as other servers' clients send them, in the words of our schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hybridkv.server.messages import Message

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of content parts that are text, and where it stands in them."""
_FUNCTION = ("name", "description", "parameters", "strict")


def relax_messages(body: dict[str, Any]) -> Iterator[str]:
    """Bring a body's messages into our words; the names of what was left out."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    turns: list[Any] = []
    for message in messages:
        if not isinstance(message, dict):
            turns.append(message)
            continue
        turn = {name: value for name, value in message.items() if value is not None}
        turn.setdefault("content", "")
        if turn.get("role") == "function":
            turn["role"] = "tool"
        if "reasoning" in turn and isinstance(turn["reasoning"], str):
            turn.setdefault("reasoning_content", turn.pop("reasoning"))
        yield from _content(turn)
        _calls(turn)
        for name in [name for name in turn if name not in Message.model_fields]:
            del turn[name]
            yield f"messages.{name}"
        turns.append(turn)
    body["messages"] = turns


def _content(turn: dict[str, Any]) -> Iterator[str]:
    """Turn parts into text, thoughts apart; a tool's answer that is no text becomes JSON."""
    content = turn["content"]
    if isinstance(content, dict) and turn.get("role") == "tool":
        turn["content"] = json.dumps(content)
    if not isinstance(content, list):
        return
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind if isinstance(kind, str) else None
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif kind in _TEXTS and isinstance(part.get(_TEXTS[kind]), str):
            parts.append({"type": "text", "text": part[_TEXTS[kind]]})
            if set(part) - {"type", _TEXTS[kind], "annotations", "citations"}:
                yield from (f"messages.content.{name}" for name in part if name not in ("type", _TEXTS[kind]))
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + part["thinking"]
        else:
            parts.append(part)
    turn["content"] = parts


def _calls(turn: dict[str, Any]) -> None:
    """Turn calls into an assistant's `tool_calls`, whatever they lack."""
    if isinstance(turn.get("function_call"), dict):
        turn["tool_calls"] = [{"type": "function", "function": turn.pop("function_call")}]
    calls = turn.get("tool_calls")
    if not calls:
        turn.pop("tool_calls", None)
    elif isinstance(calls, list):
        turn["tool_calls"] = [_call(call) if isinstance(call, dict) else call for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        function = {k: v for k, v in function.items() if k in ("name", "arguments") and v is not None}
    kept = {k: v for k, v in call.items() if k in ("id", "index") and v is not None}
    return kept | {"type": "function", "function": function}


def relax_tools(body: dict[str, Any]) -> Iterator[str]:
    """Bring a body's tools into our words, the older functions too; the names of what was left out."""
    if functions := body.pop("functions", None):
        body.setdefault("tools", functions)
    if (call := body.pop("function_call", None)) is not None:
        body.setdefault("tool_choice", call)
    tools = body.get("tools")
    if isinstance(tools, list):
        kept = []
        for tool in tools:
            if not isinstance(tool, dict):
                kept.append(tool)
            elif isinstance(function := tool.get("function", tool if "name" in tool else None), dict):
                function = {k: v for k, v in function.items() if k in _FUNCTION and v is not None}
                kept.append({"type": "function", "function": function})
            elif tool.get("type") == "function":
                kept.append(tool)
            else:
                yield f"tools.{tool.get('type')}"
        body["tools"] = kept
    if not body.get("tools"):
        body.pop("tools", None)
        for name in ("tool_choice", "parallel_tool_calls"):
            if body.pop(name, None) not in (None, "none", "auto", True, False):
                yield name
    elif "tool_choice" in body:
        body["tool_choice"] = _choice(body["tool_choice"])


def _choice(choice: Any) -> Any:
    if choice == "any":
        return "required"
    if isinstance(choice, dict):
        kind = choice.get("type")
        if kind in ("auto", "none", "required", "any"):
            return _choice(kind)
        function = choice.get("function", choice)
        name = function if isinstance(function, str) else function.get("name") if isinstance(function, dict) else None
        return {"type": "function", "function": {"name": name}}
    return choice
