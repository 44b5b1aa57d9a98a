"""Tools for a chat template that knows none: the system message teaches Hermes's way of calling them.

Answers of tools become messages of the user's, calls a part of what the assistant said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hybridkv.server.dialects import HERMES

_LESSON = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within {opens}{closes} XML tags:
{opens}
{{"name": <function-name>, "arguments": <args-json-object>}}
{closes}"""


def taught(turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rewrite turns to those of system, user and assistant alone, in which the tools are taught."""
    told: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            content = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if told and told[-1].get("answers"):
                told[-1]["content"] += f"\n{content}"
            else:
                told.append({"role": "user", "content": content, "answers": True})
        elif turn.get("tool_calls"):
            calls = [_written(call["function"]) for call in turn["tool_calls"]]
            content = "\n".join([*([turn["content"]] if turn["content"] else []), *calls])
            told.append({"role": "assistant", "content": content})
        else:
            told.append(dict(turn))
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        lesson = _LESSON.format(tools=listed, opens=HERMES.opens, closes=HERMES.closes)
        if told and told[0]["role"] == "system":
            lesson = f"{told[0]['content']}\n\n{lesson}"
            told = told[1:]
        told.insert(0, {"role": "system", "content": lesson})
    return [{name: value for name, value in turn.items() if name != "answers"} for turn in told]


def _written(function: dict[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{HERMES.opens}\n{json.dumps(call, ensure_ascii=False)}\n{HERMES.closes}"
