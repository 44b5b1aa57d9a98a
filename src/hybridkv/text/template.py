"""Chat templates as Transformers renders them: Jinja in its immutable sandbox, with the same helpers.

Owns what a template can see and call. A template is a stranger's program; the limits on its time and its output are
`chat.py`'s.

Source: transformers, utils/chat_template_utils.py (`_compile_jinja_template`, `render_jinja_template`), which tests
compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's thoughts come under; the first is the one that templates read."""


def render(template: str, messages: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """Return what a template makes of a conversation.

    Parameters
    ----------
    values
        Whatever else it can read: names of special tokens, `add_generation_prompt`, `tools`.

    Raises
    ------
    TemplateError, SecurityError
        From Jinja, and whatever else a template stumbles over.
    """
    values = {"tools": None, "documents": None, **values}
    plain = {name: _plain(value) for name, value in values.items()}
    return _compiled(template).render(messages=[_message(message) for message in messages], **plain)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without what is None, its thoughts under the names that templates read."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    thoughts = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if thoughts is None else {"thinking": thoughts, **plain, "reasoning_content": thoughts}


def _plain(value: Any) -> Any:
    """Return JSON's own types alone: methods of others are not for a stranger to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(held) for held in value) if type(value) in (list, tuple) else list(map(_plain, value))
    return f"<{type(value).__name__}>"


class _Generation(Extension):
    """`{% generation %}` blocks, which mark what an assistant wrote for training: here they are their text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` in a template, without the way from a class to what Python is made of."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in a template; no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"Chat templates cannot store underscore-prefixed attributes on a namespace: {name!r}.")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(how: str) -> str:
    return datetime.now().strftime(how)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)
