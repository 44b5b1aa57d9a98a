"""Corrects the served OpenAPI document where FastAPI says other than what this server does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from hybridkv.server.request_handler import Served
from hybridkv.server.schema import MAX_SEED

_REQUESTS = ("CompletionRequest", "ChatRequest")


def correct_document(app: FastAPI, served: Served) -> None:
    """Correct what FastAPI says: wrong fields give 400 in OpenAI's shape, and bounds of 63 bits are no floats.

    What this model's tokenizer takes is added: an empty text is a prompt only where a token is put before it. A server
    that is not strict passes over fields that it does not know.
    """
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name in _REQUESTS:
        schemas[name]["properties"]["seed"]["anyOf"][0] |= {"minimum": -MAX_SEED, "maximum": MAX_SEED}
    needs_text = served.tokenizer is None or not served.tokenizer("").input_ids
    for prompt in _walk(schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]):
        if prompt.get("type") == "integer":
            prompt["exclusiveMaximum"] = served.n_vocab
        elif prompt.get("type") == "string" and needs_text:
            prompt["minLength"] = 1
        elif prompt.get("type") == "array":
            prompt["minItems"] = 1
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]["exclusiveMaximum"] = served.n_vocab
    if not served.strict:
        for name in _reached(schemas, _REQUESTS):
            if name != "KVTypesField":  # a type that is mistyped is an error
                schemas[name].pop("additionalProperties", None)


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema in one."""
    if isinstance(value, dict):
        yield value
        for held in value.values():
            yield from _walk(held)
    elif isinstance(value, list):
        for held in value:
            yield from _walk(held)


def _reached(schemas: dict[str, Any], names: tuple[str, ...]) -> set[str]:
    """Find these schemas and all that they refer to."""
    found: set[str] = set()
    wanted = set(names)
    while wanted - found:
        name = (wanted - found).pop()
        found.add(name)
        wanted |= {str(s["$ref"]).rpartition("/")[2] for s in _walk(schemas[name]) if isinstance(s.get("$ref"), str)}
    return found
