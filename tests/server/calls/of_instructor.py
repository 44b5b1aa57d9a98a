"""Calls of instructor, which reads answers into classes and asks again where they do not fit."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field

from tests.server.calls.of_openai import City
from tests.server.calls.record import USER, Call
from tests.server.conftest import Running


def _check(server: Running, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(server.client, mode=instructor.Mode[mode])
    city = client.chat.completions.create(model="m", messages=USER, response_model=City, max_retries=0)
    assert isinstance(city, City)
    assert (city.city, city.degrees) == ("Paris", 21)
    assert len(server.served.runner.handles) == 1  # type: ignore[attr-defined]


def by_tool(server: Running) -> None:
    """As a tool that has to be called, its default."""
    _check(server, "TOOLS")


def by_json(server: Running) -> None:
    """In JSON mode."""
    _check(server, "JSON")


def by_schema(server: Running) -> None:
    """By a JSON schema."""
    _check(server, "JSON_SCHEMA")


def asked_again(server: Running) -> None:
    """What does not fit goes back with the reason, and is asked for again."""
    instructor = pytest.importorskip("instructor")

    class Cold(BaseModel):
        city: str
        degrees: int = Field(le=0)

    client = instructor.from_openai(server.client, mode=instructor.Mode.TOOLS)
    with pytest.raises(pytest.importorskip("instructor.core").InstructorRetryException):
        client.chat.completions.create(model="m", messages=USER, response_model=Cold, max_retries=1)
    first, second = (t.request.prompt_ids for t in server.served.runner.handles)  # type: ignore[attr-defined]
    assert "less than or equal to 0" in server.served.tokenizer.decode(second)
    assert len(second) > len(first)


CALLS = (
    Call("instructor", "a class by tool", "city call", by_tool),
    Call("instructor", "a class by JSON mode", "json", by_json),
    Call("instructor", "a class by schema", "json", by_schema),
    Call("instructor", "a second try", "city call", asked_again),
)
