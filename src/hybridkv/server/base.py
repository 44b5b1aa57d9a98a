"""The base of all request shapes: no unknown field, no number in a string, no NaN."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fragment = dict[str, Any]
"""A piece of JSON Schema, for the document."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """No unknown field, no number in a string, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def whole(value: Any) -> Any:
    """Make integers of numbers such as 4.0, which are integers in JSON Schema's words."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    return {name: whole(item) for name, item in value.items()} if isinstance(value, dict) else value
