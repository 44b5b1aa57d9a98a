"""The application: routes, and what stands around them. Calls everything else here and is called by none of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from hybridkv import __version__
from hybridkv.errors import HybridKVError
from hybridkv.server.document import correct_document
from hybridkv.server.embeddings import add_embeddings
from hybridkv.server.gate import GateMiddleware, GateOptions, GateState
from hybridkv.server.merge import CONTENT_TYPE
from hybridkv.server.metrics import Metrics
from hybridkv.server.page import Page
from hybridkv.server.refusals import RefusalError, refusal_for, refusal_for_mistakes
from hybridkv.server.relax import Relax
from hybridkv.server.replies import ChatCompletion, Completion, Error, Health, Model, Models, Session, Status
from hybridkv.server.request_handler import RequestHandler, Served
from hybridkv.server.respond import json_response, respond
from hybridkv.server.schema import ID_PATTERN, ChatRequest, CompletionRequest
from hybridkv.server.vocabulary import add_vocabulary
from hybridkv.server.writers import ChatWriter, CompletionWriter

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "a body that is not JSON, wrong fields, or more tokens or bytes than fit"},
    401: {"model": Error, "description": "a wrong API key, or none"},
    403: {"model": Error, "description": "a host name that is not this machine's"},
    404: {"model": Error, "description": "no such model"},
    408: {"model": Error, "description": "a body that takes too long to arrive"},
    409: {"model": Error, "description": "a session that is being answered, or cannot be kept or read"},
    413: {"model": Error, "description": "a body that is too large"},
    415: {"model": Error, "description": "a body of another kind than JSON"},
    429: {"model": Error, "description": "too many requests wait; Retry-After says when to come back"},
    500: {"model": Error, "description": "the engine failed"},
    503: {"model": Error, "description": "the server is shutting down"},
}


SessionName = Annotated[str, PathParameter(json_schema_extra={"pattern": ID_PATTERN})]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


_POST_ERRORS = _errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def create_app(served: Served, options: GateOptions, state: GateState) -> FastAPI:
    """Create the application for one model.

    Parameters
    ----------
    served
        The model and what runs it.
    options
        Keys and limits.
    state
        Where a shutdown is announced, and how many requests are still answered.
    """
    metrics = Metrics(served.runner.stats)
    handler = RequestHandler(served, metrics)
    app = FastAPI(
        title="hybridkv",
        version=__version__,
        description="OpenAI's completions on a quantized KV cache.",
        docs_url=None,  # its page loads code from elsewhere
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    _add_handlers(app)
    _add_completions(app, handler)
    _add_sessions(app, handler)
    _add_reports(app, handler, state)
    add_vocabulary(app, handler)
    add_embeddings(app, handler)
    correct_document(app, served)
    if not served.strict:
        app.add_middleware(Relax, model=served.name, notify=served.notify)
    app.add_middleware(GateMiddleware, options=options, state=state, count=metrics.count_reply)
    return app


def _add_completions(app: FastAPI, handler: RequestHandler) -> None:
    served = handler.served

    @app.post("/completions", include_in_schema=False)
    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=_POST_ERRORS | {200: {"content": {"text/event-stream": {}}}},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        pending = await handler.complete(body)
        writer = CompletionWriter(served.name, served.fingerprint, pending.created)
        return await respond(pending, writer, request, stream=bool(body.stream), with_usage=_with_usage(body))

    @app.post("/chat/completions", include_in_schema=False)
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=_POST_ERRORS | {200: {"content": {"text/event-stream": {}}}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        pending = await handler.chat(body)
        writer = ChatWriter(served.name, served.fingerprint, pending.created)
        return await respond(pending, writer, request, stream=bool(body.stream), with_usage=_with_usage(body))


def _add_sessions(app: FastAPI, handler: RequestHandler) -> None:
    options: dict[str, Any] = {
        "response_model": Session,
        "responses": _POST_ERRORS | _errors(409),
        # What comes is not read; its type, which a web page elsewhere may not send, must be JSON's (`gate.py`).
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": {}}}}},
    }

    @app.post("/v1/sessions/{name}/save", **options)
    async def save_session(name: SessionName) -> Response:
        """Write what a session's last request left, so that it outlives the server."""
        return json_response(await handler.sessions.save(name))

    @app.post("/v1/sessions/{name}/restore", **options)
    async def restore_session(name: SessionName) -> Response:
        """Read it back, so that requests that resume from it do not start over."""
        return json_response(await handler.sessions.restore(name))


def _with_usage(body: CompletionRequest | ChatRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _add_reports(app: FastAPI, handler: RequestHandler, state: GateState) -> None:
    served, page = handler.served, Page(resources.files("hybridkv.server").joinpath("page.html").read_text("utf-8"))

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", response_model=Models, responses=_errors(401, 403))
    async def models() -> Response:
        """List the one model that is served."""
        return json_response(Models(data=[model()]))

    @app.get("/v1/models/{name:path}", response_model=Model, responses=_errors(401, 403, 404))
    async def model_by_name(name: str) -> Response:
        """Describe the served model, by its name."""
        if name != served.name:
            raise RefusalError(404, f"model {name!r}; this server has {served.name!r}", code="model_not_found")
        return json_response(model())

    def model() -> Model:
        return Model(
            id=served.name,
            created=handler.created,
            owned_by="hybridkv",
            context_length=served.n_ctx,
            cache_type_k=served.types.type_k,
            cache_type_v=served.types.type_v,
            chat=handler.prompts.can_chat,
        )

    @app.get("/v1/status", response_model=Status, responses=_errors(401, 403))
    async def status() -> Response:
        """Report memory and speed, now."""
        return json_response(handler.status())

    @app.get("/health", response_model=Health, responses=_errors(403) | {503: {"model": Health}})
    async def health() -> Response:
        """Tell whether new requests are taken."""
        return json_response(Health(status="stopping"), 503) if state.stopping else json_response(Health(status="ok"))

    @app.get("/metrics", responses=_errors(401, 403) | {200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Report counts for Prometheus."""
        return Response(handler.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        """Return the chat page."""
        return Response(page.text, media_type="text/html", headers=page.headers)


def _add_handlers(app: FastAPI) -> None:
    """Add handlers that give every error OpenAI's shape."""

    def add(kind: type[Exception], refuse: Callable[[Any], RefusalError]) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            return refuse(error).response()

        handler: Callable[[Request, Any], Awaitable[Response]] = handle
        app.add_exception_handler(kind, handler)

    async def unmatched(request: Request, error: Any) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"nothing is at {request.url.path}; /openapi.json lists the paths, such as /v1/chat/completions"
        return RefusalError(error.status_code, message, headers=dict(error.headers or {})).response()

    add(RefusalError, lambda refusal: refusal)
    add(HybridKVError, refusal_for)
    add(RequestValidationError, lambda error: refusal_for_mistakes(error.errors()))
    app.add_exception_handler(HTTPException, unmatched)
    # The traceback goes to the server's log, not to the client.
    add(Exception, lambda _: RefusalError(500, "the server failed; its log says more", code="internal_error"))
