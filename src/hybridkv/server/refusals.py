"""Errors as replies: statuses and OpenAI's error shape. The only place that writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from hybridkv.errors import AdmissionError, ContextError, GuardError, HybridKVError
from hybridkv.server.replies import Error, ErrorBody, RefusalCounts

RETRY_AFTER_S = 1

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
TOO_LONG = "the request exceeds the available context size"
"""llama-server's words: LiteLLM and others fall back to another model where they read them in a reply of status 400."""
_MAX_MISTAKES = 3
_MAX_MESSAGE = 2000


class RefusalError(Exception):
    """A request that ends in an error reply.

    Parameters
    ----------
    status
        HTTP status.
    message
        What was asked and what is allowed.
    code
        OpenAI's word for it, where there is one.
    param
        The field to blame.
    headers
        Of the reply.
    numbers
        What was counted, where room is lacking.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        numbers: RefusalCounts | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.message, self.headers, self.numbers = message, dict(headers or {}), numbers

    @property
    def body(self) -> ErrorBody:
        """The object under `error`."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # A lone surrogate, quoted from a request, has no UTF-8 form.
        message = self.message.encode(errors="replace").decode()[:_MAX_MESSAGE]
        param = None if self.param is None else self.param.encode(errors="replace").decode()
        return ErrorBody(message=message, type=kind, param=param, code=self.code, numbers=self.numbers)

    def response(self) -> Response:
        """Return the refusal as a reply."""
        text = Error(error=self.body).model_dump_json()
        return Response(text, self.status, media_type="application/json", headers=self.headers)


def refusal_for(error: HybridKVError) -> RefusalError:
    """Convert an error of ours to a refusal."""
    if isinstance(error, AdmissionError):
        return _not_admitted(error)
    message = str(error)
    if isinstance(error, ContextError):
        return RefusalError(400, f"{TOO_LONG}: {message}", code="context_length_exceeded")
    if isinstance(error, GuardError):
        return RefusalError(500, message)
    return RefusalError(400, message)


def _not_admitted(error: AdmissionError) -> RefusalError:
    numbers = RefusalCounts(
        n_tokens=error.n_tokens,
        most_tokens=error.most_tokens,
        planned_bytes=error.planned_bytes,
        budget_bytes=error.budget_bytes,
    )
    later = {"Retry-After": str(RETRY_AFTER_S)}
    if error.reason == "too_large":
        return RefusalError(400, f"{TOO_LONG}: {error}", code="context_length_exceeded", numbers=numbers)
    if error.reason == "queue_full":
        return RefusalError(429, str(error), code="queue_full", headers=later, numbers=numbers)
    return RefusalError(503, str(error), code="stopping", headers=later)


def refusal_for_mistakes(mistakes: Sequence[Mapping[str, Any]]) -> RefusalError:
    """Report what pydantic found wrong with a body, in its order; the first few."""
    first = mistakes[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return RefusalError(
            400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="invalid_json"
        )
    lines = []
    for mistake in mistakes[:_MAX_MISTAKES]:
        where = ".".join(str(part) for part in mistake["loc"][1:])
        what = str(mistake["msg"]).removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            what = "no such field"
        lines.append(f"{where}: {what}" if where else what)
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return RefusalError(400, "; ".join(lines), param=param)
