"""`/v1/embeddings`: vectors of texts, from a model whose file says how they are pooled."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from torch import Tensor

from hybridkv.engine.embed import Embedder
from hybridkv.server.base import Strict, TokenId, whole
from hybridkv.server.prompts import check_text
from hybridkv.server.refusals import TOO_LONG, RefusalError
from hybridkv.server.replies import Error, Reply
from hybridkv.server.request_handler import RequestHandler
from hybridkv.server.respond import json_response

MAX_TEXTS = 2048
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 403, 404, 408, 413, 415, 429, 503)
}


def _as_texts(value: Any) -> Any:
    """Turn what may be one text into a list of texts, each a text or token ids."""
    if isinstance(value, str):
        return [value]
    return [value] if isinstance(value, list) and value and isinstance(value[0], int) else value


Text = str | list[TokenId]
Texts = Annotated[list[Text], BeforeValidator(_as_texts, json_schema_input_type=str | list[TokenId] | list[Text])]


class EmbeddingsRequest(Strict):
    """The body of `/v1/embeddings`."""

    input: Texts = Field(min_length=1, max_length=MAX_TEXTS, description="text, or token ids, or a list of them")
    model: str | None = Field(None, max_length=512, description="the served model's name; the only one if left out")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, BeforeValidator(whole)] = Field(
        None, ge=1, description="the first so many values, brought to length 1 again"
    )
    user: str | None = Field(None, max_length=512, description="accepted; nothing is done with it")


class Embedding(Reply):
    """A vector: values, or the bytes of little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    """The reply of `/v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(app: FastAPI, handler: RequestHandler) -> None:
    """Add the route."""
    served, one_at_a_time = handler.served, asyncio.Semaphore(1)

    offered = served.embedder is not None

    @app.post("/embeddings", include_in_schema=False)
    @app.post("/v1/embeddings", response_model=Embeddings, responses=_ERRORS, include_in_schema=offered)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Embed texts; a model that generates text refuses."""
        if served.embedder is None:
            raise RefusalError(
                400,
                f"{served.name!r} generates text and its file names no pooling; allowed: /v1/completions, "
                "/v1/chat/completions\nhint: serve a GGUF file whose metadata has a pooling_type, or give --pooling",
                code="no_pooling",
            )
        ids = [await _ids(handler, served.embedder, number, text) for number, text in enumerate(body.input)]
        width = body.dimensions or served.embedder.n_embd
        if width > served.embedder.n_embd:
            raise RefusalError(400, f"dimensions: {width}; allowed: 1 to {served.embedder.n_embd}", param="dimensions")
        vectors = []
        for text in ids:
            async with one_at_a_time:
                vectors.append(await asyncio.to_thread(served.embedder.embed, text))
        data = [
            Embedding(index=index, embedding=_written(vector[:width], body.encoding_format))
            for index, vector in enumerate(vectors)
        ]
        n_tokens = sum(map(len, ids))
        usage = EmbeddingUsage(prompt_tokens=n_tokens, total_tokens=n_tokens)
        return json_response(Embeddings(data=data, model=served.name, usage=usage))


async def _ids(handler: RequestHandler, embedder: Embedder, number: int, text: str | list[int]) -> list[int]:
    """Tokenize a text, with what the vocabulary puts around it."""
    where = f"input.{number}"
    if isinstance(text, str):
        check_text(text, where)
        tokens = handler.prompts.tokens
        ids = await handler.prompts.in_thread(len(text), lambda: tokens(text, add_special=True, parse_special=False))
    else:
        ids = text
    if any(token >= handler.served.n_vocab for token in ids):
        raise RefusalError(
            400, f"{where}: {max(ids)}; this model's tokens are 0 to {handler.served.n_vocab - 1}", param=where
        )
    if not ids:
        raise RefusalError(400, f"{where}: the text has no tokens", param=where)
    if len(ids) > embedder.n_ctx:
        message = f"{TOO_LONG}: {where} has {len(ids)} tokens; allowed: {embedder.n_ctx}"
        raise RefusalError(400, message, code="context_length_exceeded", param=where)
    return ids


def _written(vector: Tensor, form: str | None) -> list[float] | str:
    unit = torch.nn.functional.normalize(vector, dim=0)
    if form == "base64":
        return base64.b64encode(unit.numpy().astype("<f4").tobytes()).decode()
    return [float(number) for number in unit]
