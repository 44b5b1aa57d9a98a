"""Routes of llama-server's that tell about the model: tokens of a text, a text of tokens, and what is served."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from hybridkv import __version__
from hybridkv.server.base import Strict, TokenId, whole
from hybridkv.server.prompts import check_text
from hybridkv.server.refusals import RefusalError
from hybridkv.server.replies import Error, Reply
from hybridkv.server.request_handler import RequestHandler
from hybridkv.server.respond import json_response
from hybridkv.text.detokenize import token_bytes

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 403, 404, 408, 413, 415, 429, 503)
}


class TokenizeRequest(Strict):
    """The body of `/tokenize`."""

    content: str
    add_special: bool = Field(False, description="put around it what the vocabulary puts around a text")
    parse_special: bool = Field(True, description="whether control words in it are control tokens")
    with_pieces: bool = False


class Piece(Reply):
    """A token and its text; its bytes where they are no text."""

    id: int
    piece: str | list[int]


class Tokens(Reply):
    """The reply of `/tokenize`."""

    tokens: list[int] | list[Piece]


class DetokenizeRequest(Strict):
    """The body of `/detokenize`."""

    tokens: Annotated[list[TokenId], BeforeValidator(whole)]


class Content(Reply):
    """The reply of `/detokenize`."""

    content: str


class GenerationSettings(Reply):
    """The settings of a sequence."""

    n_ctx: int


class Modalities(Reply):
    """The kinds of input that the model takes beside text."""

    vision: bool = False
    audio: bool = False


class Props(Reply):
    """The reply of `/props`, as far as it has a meaning here."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str
    modalities: Modalities


def add_vocabulary(app: FastAPI, handler: RequestHandler) -> None:
    """Add the routes."""
    served, prompts = handler.served, handler.prompts

    @app.post("/tokenize", response_model=Tokens, responses=_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Tokenize a text."""
        check_text(body.content, "content")
        added, parsed = body.add_special, body.parse_special
        ids = await prompts.in_thread(
            len(body.content), lambda: prompts.tokens(body.content, add_special=added, parse_special=parsed)
        )
        if not body.with_pieces:
            return json_response(Tokens(tokens=ids))
        return json_response(Tokens(tokens=[Piece(id=token, piece=_piece(served.tokenizer, token)) for token in ids]))

    @app.post("/detokenize", response_model=Content, responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Write tokens as text."""
        bad = next((token for token in body.tokens if token >= served.n_vocab), None)
        if bad is not None:
            raise RefusalError(400, f"tokens: {bad}; this model's tokens are 0 to {served.n_vocab - 1}", param="tokens")
        raw = b"".join(token_bytes(served.tokenizer, token) for token in body.tokens)
        return json_response(Content(content=raw.decode(errors="replace")))

    @app.get("/props", response_model=Props, responses={status: {"model": Error} for status in (401, 403)})
    async def props() -> Response:
        """Describe what is served."""
        tokenizer = served.tokenizer
        return json_response(
            Props(
                default_generation_settings=GenerationSettings(n_ctx=served.n_ctx),
                total_slots=served.parallel,
                model_alias=served.name,
                model_path=served.name,
                chat_template=prompts.template,
                bos_token=str(tokenizer.special_tokens_map.get("bos_token", "")),
                eos_token=str(tokenizer.special_tokens_map.get("eos_token", "")),
                build_info=f"hybridkv {__version__}",
                modalities=Modalities(),
            )
        )


def _piece(tokenizer: Any, token: int) -> str | list[int]:
    raw = token_bytes(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
