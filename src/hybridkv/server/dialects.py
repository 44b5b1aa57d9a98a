"""The ways in which models write tool calls: one table, and a reader for each.

A reader is a pure function from the text of a call so far to the calls in it, so that a stream is the difference
between two readings. What a text that is at its end does not hold is an error: it is then no call but text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Tools = Mapping[str, Mapping[str, Any]]
"""Name of each tool -> JSON schema of its parameters."""

_MAX_LITERAL = 1 << 16


class UnreadableCallError(ValueError):
    """A text that is at its end and is no call."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as far as it is written; `arguments` is the beginning of a JSON object's text, or all of it."""

    name: str
    arguments: str


Reader = Callable[[str, bool, Tools], list[Call]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of writing calls.

    Attributes
    ----------
    name
        As it is known.
    signs
        The chat template of a model that writes so contains one of these.
    opens, closes
        What stands around calls; without a closing word they reach to the answer's end.
    read
        The reader.
    bare
        Whether an answer may be a call as a whole, without an opening word.
    key
        What the arguments of an object are called.
    lists
        Whether calls stand in a list between the words.
    example
        A call of `f` with the argument `x` = 1, as tests and documentation have it.
    """

    name: str
    signs: tuple[str, ...]
    opens: str
    closes: str
    read: Reader
    bare: bool = False
    key: str = "arguments"
    lists: bool = False
    example: str = ""


def _end_of(text: str, at: int) -> int | None:
    """Find the end of the JSON value that begins at `at`; None if the text ends before it."""
    if text[at : at + 1] == '"':
        match = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL).match(text, at)
        return None if match is None else match.end()
    if text[at : at + 1] not in ("{", "["):
        match = re.compile(r"[^\s,}\]]+(?=[\s,}\]])").match(text, at)
        return None if match is None else match.end()
    depth, inside, escaped = 0, False, False
    for index in range(at, len(text)):
        letter = text[index]
        if inside:
            inside, escaped = escaped or letter != '"', letter == "\\" and not escaped
        elif letter == '"':
            inside = True
        elif letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
            if not depth:
                return index + 1
    return None


_KEY = re.compile(r'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*(?=\S)', re.DOTALL)


def _members(text: str, at: int) -> Iterator[tuple[str, int, int | None]]:
    """Yield keys of the object that begins at `at`, with where each value begins, and where it ends if it does."""
    while (match := _KEY.match(text, at)) is not None:
        end = _end_of(text, match.end())
        yield str(json.loads(match[1], strict=False)), match.end(), end
        if end is None or text[end:].lstrip()[:1] == "}":
            return
        at = end


def read_json(text: str, final: bool, tools: Tools) -> list[Call]:
    """Read objects with `name` and `arguments` (or `parameters`), alone, in a list, or one after the other."""
    calls: list[Call] = []
    at, begin = 0, re.compile(r"[\s\[,;]*(?=\{)")
    while (match := begin.match(text, at)) is not None:
        end = _end_of(text, match.end())
        name, arguments = None, None
        for key, value, value_end in _members(text, match.end()):
            if key == "function" and text[value] == "{":  # OpenAI's own form
                calls += read_json(text[value:value_end], value_end is not None and final, tools)
                name = ""
            elif key == "name" and value_end is not None and text[value] == '"':
                name = str(json.loads(text[value:value_end], strict=False))
            elif key in ("arguments", "parameters") and text[value] in '{"':
                arguments = _arguments(text[value:value_end], whole=value_end is not None)
        if name and (arguments is not None or end is not None):
            calls.append(Call(name, "{}" if arguments is None else arguments))
        if end is None or name is None:
            if final:
                raise UnreadableCallError(text[match.end() :][:80])
            return calls
        at = end
    if final and (not calls or text[at:].strip(" \n\r\t],;")):
        raise UnreadableCallError(text[at:][:80])
    return calls


def _arguments(value: str, *, whole: bool) -> str | None:
    """Return arguments as an object's text; those that a model has put into a string come once it has ended."""
    if value.startswith("{"):
        if whole:
            _check_json(value)
        return value
    if not whole:
        return None
    inner = str(json.loads(value, strict=False))
    _check_json(inner)
    return inner


def _check_json(text: str) -> None:
    try:
        if not isinstance(json.loads(text, strict=False), dict):
            raise UnreadableCallError(text[:80])
    except (ValueError, RecursionError) as error:
        raise UnreadableCallError(text[:80]) from error


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def read_xml(text: str, final: bool, tools: Tools) -> list[Call]:
    """Read `<function=NAME><parameter=KEY>value</parameter></function>`; the tool's schema types the values."""
    calls = []
    for function in _FUNCTION.finditer(text):
        name, whole = function[1].strip(), bool(function[3])
        properties = tools.get(name, {}).get("properties", {})
        members = []
        for parameter in _PARAMETER.finditer(function[2]):
            if not parameter[3] and not (whole or parameter.end() < len(function[2])):
                break
            key = parameter[1].strip()
            value = _typed(parameter[2].removeprefix("\n").removesuffix("\n"), properties.get(key))
            members.append(f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
        if final and not whole:
            raise UnreadableCallError(text[:80])
        calls.append(Call(name, "{" + ", ".join(members) + ("}" if whole else "")))
    if final and not calls:
        raise UnreadableCallError(text[:80])
    return calls


def _typed(text: str, schema: Any) -> Any:
    """Type a value that is written without quotes: text, unless the schema names other types alone."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if "string" in kinds or (
        not kinds and not (isinstance(schema, Mapping) and ("anyOf" in schema or "$ref" in schema))
    ):
        return None if text == "null" and "null" in kinds else text
    lowered = text.strip().lower()
    if lowered in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lowered]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_NAMES = {"true": True, "false": False, "null": None}


_OBJECTS = re.compile(r"\s*\[?\s*\{")


def read_python(text: str, final: bool, tools: Tools) -> list[Call]:
    """Read `[f(x=1), g(y="z")]` as Python's literals; nothing is executed. Calls come once all are there."""
    if _OBJECTS.match(text):
        return read_json(text, final, tools)
    if not final:
        return []
    if len(text) > _MAX_LITERAL:
        raise UnreadableCallError(f"{len(text)} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
        return [_python_call(node) for node in nodes] or _no_call(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError) as error:
        raise UnreadableCallError(text[:80]) from error


def _no_call(text: str) -> list[Call]:
    raise UnreadableCallError(text[:80])


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise UnreadableCallError(ast.dump(node)[:80])
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise UnreadableCallError("**")
        value = _Literals().visit(keyword.value)
        arguments[keyword.arg] = ast.literal_eval(value)
    return Call(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False))


class _Literals(ast.NodeTransformer):
    """Makes values of JSON's names."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMES[node.id]) if node.id in _NAMES else node


_NAMED = re.compile(r"\s*([A-Za-z0-9_.:/-]+)\s*(?:\[CALL_ID\]\w*)?\[ARGS\]\s*(?=\{)")


def read_mistral(text: str, final: bool, tools: Tools) -> list[Call]:
    """Read a list of objects, or since Mistral Small 3.2 `NAME[ARGS]{...}`."""
    if text.lstrip()[:1] in ("[", "{", ""):
        return read_json(text, final, tools)
    match = _NAMED.match(text)
    if match is None:
        return _no_call(text) if final else []
    end = _end_of(text, match.end())
    if final and end is None:
        raise UnreadableCallError(text[:80])
    arguments = _arguments(text[match.end() : end], whole=end is not None)
    return [Call(match[1], arguments or "{}")]


_OBJECT = '{"name": "f", "arguments": {"x": 1}}'

DIALECTS = (
    Dialect(
        "qwen3-coder",
        ("<function=",),
        "<tool_call>",
        "</tool_call>",
        read_xml,
        example="<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
    ),
    Dialect(
        "nemotron",
        ("<TOOLCALL>",),
        "<TOOLCALL>",
        "</TOOLCALL>",
        read_json,
        lists=True,
        example=f"<TOOLCALL>[{_OBJECT}]</TOOLCALL>",
    ),
    Dialect(
        "lfm2",
        ("<|tool_call_start|>", "<|tool_list_start|>"),
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        read_python,
        lists=True,
        example="<|tool_call_start|>[f(x=1)]<|tool_call_end|>",
    ),
    Dialect(
        "granite", ("<|tool_call|>",), "<|tool_call|>", "", read_json, lists=True, example=f"<|tool_call|>[{_OBJECT}]"
    ),
    Dialect(
        "mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", "", read_mistral, lists=True, example=f"[TOOL_CALLS][{_OBJECT}]"
    ),
    Dialect(
        "hermes",
        ("<tool_call>",),
        "<tool_call>",
        "</tool_call>",
        read_json,
        example=f"<tool_call>\n{_OBJECT}\n</tool_call>",
    ),
    Dialect(
        "llama3",
        ("<|python_tag|>", "<|start_header_id|>"),
        "<|python_tag|>",
        "",
        read_json,
        bare=True,
        key="parameters",
        example='{"name": "f", "parameters": {"x": 1}}',
    ),
)
"""The first whose sign a chat template has; Hermes's, which a prompt can teach, where none has."""

HERMES = next(dialect for dialect in DIALECTS if dialect.name == "hermes")


def dialect_of(template: str) -> Dialect:
    """Find how a model with this chat template writes calls."""
    return next((d for d in DIALECTS if any(sign in template for sign in d.signs)), HERMES)
