"""The form of an answer as a grammar of llguidance's, and the matcher that follows an answer through it.

Owns the limits: a schema or grammar is a stranger's program, so its size, the work of building it and the work for each
token are bounded, and what is beyond is refused. Needs `hybridkv[structured]`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hybridkv.errors import GuardError, UsageError
from hybridkv.server.dialects import Dialect, Tools, read_xml

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SECONDS = 30.0
"""Longest that a grammar may take until its first token, waiting for others included."""
MAX_CPU_SECONDS = 10
"""Of one processor, to try it."""
MAX_SCHEMA = 1 << 18
"""Characters of a JSON schema."""
_AT_ONCE = 2
_REMEMBERED = 64
_MAX_BYTES = 4 * 2**30
_VET = Path(__file__).with_name("vet_grammar.py")

_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 2_000_000, "step_lexer_fuel": 1_000_000, "max_lexer_states": 50_000}
"""Of llguidance's work: about 40 ms to begin with and 70 ms for a token on one core; 100 MB of states."""

_WHITESPACE = r"(\x20|\x0A[\x20\x09]{0,32})"
"""Between the parts of JSON: a space, or a new line and its indent. Without a limit a weak model never stops."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as somebody has written it."""

    kind: Literal["json_schema", "gbnf", "regex", "lark"]
    text: str


class Grammars:
    """Builds matchers for one vocabulary.

    Parameters
    ----------
    tokenizer
        A fast Transformers tokenizer.
    n_vocab
        Logits of the model.
    end_ids
        Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, n_vocab: int, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._n_vocab, self._end_ids = tokenizer, n_vocab, tuple(end_ids)
        self._made: LLTokenizer | None = None
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._vetted: OrderedDict[Grammar, str] = OrderedDict()

    async def matcher(self, grammar: Grammar) -> Matcher:
        """Build a matcher at the beginning of an answer.

        Raises
        ------
        UsageError
            For what llguidance does not take, with its words, and for what takes too much work; if it is not installed.
        """
        if find_spec("llguidance") is None:
            raise UsageError(
                "response_format, grammar, regex and required tools need a package that is not installed: llguidance",
                hint='pip install "hybridkv[structured]" where the server runs',
            )
        try:
            async with asyncio.timeout(MAX_SECONDS), self._room:
                if grammar not in self._vetted:
                    self._vetted[grammar] = await _vet(grammar)
                    if len(self._vetted) > _REMEMBERED:
                        self._vetted.popitem(last=False)
                return await asyncio.to_thread(self._build, self._vetted[grammar])
        except TimeoutError as error:
            raise UsageError(f"{grammar.kind}: takes more than {MAX_SECONDS:.0f} s to build") from error

    def _build(self, grammar: str) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._made is None:
            backend = self._tokenizer.backend_tokenizer.to_str()
            self._made = LLTokenizer(backend, n_vocab=self._n_vocab, eos_token=list(self._end_ids))
        limits = LLParserLimits(verbose_errors=False, **_LIMITS)
        matcher = LLMatcher(self._made, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too much work for the first token is refused, too
        if matcher.is_error():
            raise UsageError(f"the grammar is invalid: {matcher.get_error()[:500]}")
        return Matcher(matcher, self._end_ids)


async def _vet(grammar: Grammar) -> str:
    """Try a grammar in a process that is killed when nobody waits any more; what llguidance makes of it.

    Parts of the work ask for no leave: a regular expression of a few characters can take minutes and gigabytes.

    Raises
    ------
    UsageError
        If it is not taken.
    """
    limits = {"limits": _LIMITS, "max_bytes": _MAX_BYTES, "max_cpu_s": MAX_CPU_SECONDS}
    asked = {"kind": grammar.kind, "text": grammar.text, **limits}
    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(_VET), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        reply, _ = await worker.communicate(json.dumps(asked).encode())
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    answer = json.loads(reply) if worker.returncode == 0 else {"error": "it takes too much time or memory to build"}
    if "error" in answer:
        raise UsageError(f"{grammar.kind}: {' '.join(str(answer['error']).split())[:500]}")
    return str(answer["grammar"])


class Matcher:
    """Follows one answer.

    Parameters
    ----------
    matcher
        llguidance's.
    end_ids
        Tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_ids = torch.tensor(end_ids, dtype=torch.long)

    def allowed(self) -> Tensor:
        """Return the ids of the tokens that may come next, int64.

        Raises
        ------
        GuardError
            If the grammar takes too much work here, or leaves no token.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return self._end_ids
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        ids = np.flatnonzero(bits)
        if self._matcher.is_error() or not len(ids):
            raise GuardError(f"the grammar cannot continue: {self._matcher.get_error()[:500] or 'no token fits'}")
        return torch.from_numpy(ids)

    def accept(self, token: int) -> None:
        """Take the token that came."""
        self._matcher.consume_token(token)


def of_schema(schema: dict[str, Any]) -> Grammar:
    """Build the grammar of JSON that a schema describes.

    Raises
    ------
    UsageError
        For one that is too large.
    """
    return Grammar("json_schema", _schema_text(schema))


def _schema_text(schema: dict[str, Any]) -> str:
    text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}})
    if len(text) > MAX_SCHEMA:
        raise UsageError(f"a JSON schema of {len(text)} characters; allowed: {MAX_SCHEMA}")
    return text


def of_calls(
    dialect: Dialect,
    tools: Tools,
    word: Callable[[str], str],
    *,
    several: bool,
    or_schema: dict[str, Any] | None = None,
) -> Grammar:
    """Build a grammar of one call, or of one and more.

    Parameters
    ----------
    word
        Writes a word of the dialect in Lark: a text, or a control token's id.
    several
        Whether more than one call may come.
    or_schema
        JSON that may come instead of a call.
    """
    calls = _xml_calls(tools) if dialect.read is read_xml else _json_calls(dialect, tools, several=several)
    opens = "" if dialect.bare else f"{word(dialect.opens)} "
    closes = f" {word(dialect.closes)}" if dialect.closes else ""
    one = f'{opens}"\\n"? body "\\n"?{closes}' if dialect.closes else f"{opens}body"
    again = ' ("\\n" call)*' if several and dialect.closes and not dialect.lists else ""
    start = f"call{again}"
    lines = [f"start: {start}", f"call: {one}", *calls]
    if or_schema is not None:
        lines[0] += " | other"
        lines.append(f"other: %json {_schema_text(or_schema)}")
    return Grammar("lark", "\n".join(lines))


def _json_calls(dialect: Dialect, tools: Tools, *, several: bool) -> list[str]:
    objects: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, dialect.key: _closed(parameters)},
            "required": ["name", dialect.key],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    schema: dict[str, Any] = objects[0] if len(objects) == 1 else {"anyOf": objects}
    if dialect.lists:
        schema = {"type": "array", "items": schema, "minItems": 1} | ({} if several else {"maxItems": 1})
    return [f"body: %json {_schema_text(schema)}"]


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Close a tool's parameters to names that it does not list, unless it allows others."""
    if not parameters.get("properties"):
        return {"type": "object", **parameters}
    return {"additionalProperties": False, **parameters}


def _xml_calls(tools: Tools) -> list[str]:
    functions = []
    lines = ['NL: "\\n"', "VALUE: /([^<]|<[^\\/])*/"]
    for number, (name, parameters) in enumerate(tools.items()):
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        keys = [*(key for key in properties if key in required), *(key for key in properties if key not in required)]
        parts = []
        for place, key in enumerate(keys):
            value = f"v{number}x{place}"
            lines.append(f"{value}: {_xml_value(properties[key])}")
            ends = "" if key in required else "?"
            parts.append(f"({_quoted(f'<parameter={key}>')} NL {value} {_quoted('</parameter>')} NL){ends}")
        functions.append(f"f{number}")
        lines.append(f"f{number}: {_quoted(f'<function={name}>')} NL {' '.join(parts)} {_quoted('</function>')}")
    return [f"body: {' | '.join(functions)}", *lines]


def _xml_value(schema: Any) -> str:
    """Write a value without quotes: one of those that are listed, JSON where it is no text, or any text."""
    schema = schema if isinstance(schema, dict) else {}
    listed = schema.get("enum")
    if isinstance(listed, list) and listed and all(isinstance(value, str) for value in listed):
        return f"({' | '.join(map(_quoted, listed))}) NL"
    if schema.get("type") in ("integer", "number", "boolean", "array", "object"):
        return f"%json {_schema_text(schema)} NL"
    return "VALUE"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
