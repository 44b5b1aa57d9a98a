"""One call of a client library: who makes it, what the server says, and what has to come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.server.conftest import Running

Check = Callable[[Running], None]

USER: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


SAYS = {
    "text": "It rains.",
    "thought": "<think>\nRain, I think.\n</think>\n\nIt rains.",
    "call": _call("Paris"),
    "calls": _call("Paris") + "\n" + _call("Rome"),
    "json": '{"city": "Paris", "degrees": 21}',
    "city call": '<tool_call>\n{"name": "City", "arguments": {"city": "Paris", "degrees": 21}}\n</tool_call>',
}
"""What the model behind the server answers."""
TOO_LONG = "too long"
"""The server has no room for the prompt."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call.

    Attributes
    ----------
    client
        The library, by its distribution's name.
    what
        What people want of it.
    says
        Which answer of `SAYS` the server gives; `TOO_LONG` for none.
    check
        Makes the call and asserts what comes out.
    """

    client: str
    what: str
    says: str
    check: Check
