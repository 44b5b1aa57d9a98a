"""The server on Ray Serve: one front that reads requests, and replicas that answer them.

The front is Ray's ingress: it passes a request through the gate, reads its body and hands both to the replica that
holds what the prompt begins with (`hybridkv.server.affinity`), then passes on what the replica's own application sends,
piece by piece. A replica (`hybridkv.server.replica`) is the application of one process with its scheduler. Ray starts,
watches and replaces both; a replica that is to go gets no more requests and finishes those that it has.

Nothing here needs a model: the front starts without importing torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridkv.server.affinity import Affinity, prefix_keys
from hybridkv.server.gate import GateMiddleware, GateOptions, GateState
from hybridkv.server.merge import CONTENT_TYPE, merge
from hybridkv.server.refusals import RETRY_AFTER_S, RefusalError
from hybridkv.server.replies import Error

APP = "hybridkv"
REPLICA = "replica"

REPLICA_HEADER = "X-Hybridkv-Replica"
"""Which replica has answered."""

HEALTH_SECONDS = 60.0
"""Longest that an engine may take to say that it is there: a chunk of a long prompt is not interrupted for it."""

_DRAIN_SECONDS = 600.0
"""Longest that a replica which is to go may take to finish what it answers."""

_MANY = 100_000  # requests at the front: how many is for the gate to say, with an answer

_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request on its way to a replica: what ASGI says of it, its body, and what its prompt begins with."""

    scope: dict[str, Any]
    body: bytes
    keys: tuple[bytes, ...] = ()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ray's question which replica a request should go to, put to `Affinity`."""

    # Ray asks a replica that it has not heard of for a while how much it has to do, and passes over one that does not
    # say. Its tenth of a second is short for a process that computes on all cores: the prefix would be made elsewhere.
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 8.0

    def initialize_state(self, slack: int) -> None:
        """Set the state that Ray gives as `request_router_kwargs`."""
        self._affinity = Affinity(slack)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Choose groups of replicas; Ray takes the least loaded of the first group that has room."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        groups = self._affinity.rank(_keys(pending_request), by_name)
        return [[by_name[name] for name in group] for group in groups]

    def update_replicas(self, replicas: list[Any]) -> None:
        """Update the replicas to those that there are now; called by Ray."""
        super().update_replicas(replicas)
        self._affinity.keep(replica.replica_id.unique_id for replica in replicas)

    def on_send_request(self, replica_id: Any) -> None:
        """Note that Ray sends a request; the replica may still refuse it."""
        super().on_send_request(replica_id)
        self._affinity.sent(replica_id.unique_id)

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note that a replica has taken a request; called by Ray."""
        super().on_request_routed(pending_request, replica_id, result)
        self._affinity.learn(_keys(pending_request), replica_id.unique_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Note that a request is answered or refused; called by Ray."""
        super().on_request_completed(replica_id, internal_request_id)
        self._affinity.answered(replica_id.unique_id)


def _keys(pending_request: Any) -> tuple[bytes, ...]:
    asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
    # By its attribute: Ray pickles a router's module by value, and this one's `Forwarded` is another class.
    keys = getattr(asked, "keys", ())
    return keys if isinstance(keys, tuple) else ()


class Front:
    """Hands requests to replicas; plain ASGI, behind a gate.

    Parameters
    ----------
    handle
        Gives Ray's handle of the replicas.
    """

    def __init__(self, handle: Callable[[], Any]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the application's start and end."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["method"] == "GET" and scope["path"] == "/metrics":
            await self._metrics(scope, receive, send)
        else:
            await self._forward(scope, receive, send)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            found: list[tuple[str, bytes]] = await self._handle().broadcast("metrics").results_async()
        except (RayError, RayServeException) as error:
            await _unavailable(error).response()(scope, receive, send)
            return
        await Response(merge(dict(found)), headers={"Content-Type": CONTENT_TYPE})(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
        keys = await asyncio.to_thread(prefix_keys, scope["path"], body) if body else ()
        asked = Forwarded({name: scope[name] for name in _SCOPE if name in scope}, body, keys)
        reply = _Reply(send)
        passing = asyncio.create_task(self._pass_on(asked, reply))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.wait((passing, leaving))

    async def _pass_on(self, asked: Forwarded, reply: _Reply) -> None:
        """Pass on a replica's answer; another's, if it dies before the first byte of it."""
        for last in (False, True):
            pieces = self._handle().options(method_name="answer", stream=True).remote(asked)
            try:
                async for batch in pieces:
                    for message in batch:
                        await reply.pass_on(message)
                return
            except asyncio.CancelledError:
                pieces.cancel()
                raise
            except (RayError, RayServeException) as error:
                if reply.ended:
                    return  # what goes wrong after an answer is in the replica's log
                if reply.started or last:
                    await reply.end_in(_unavailable(error), asked.scope)
                    return


class _Reply:
    """An answer on its way out, and how far it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.ended = self._streams = False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        else:
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def end_in(self, refusal: RefusalError, scope: Scope) -> None:
        """End a reply so that nobody takes it for a whole answer."""
        if not self.started:
            await refusal.response()(scope, _nothing, self._send)
            return
        body = f"data: {Error(error=refusal.body).model_dump_json()}\n\n".encode() if self._streams else b""
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _unavailable(error: Exception) -> RefusalError:
    later = {"Retry-After": str(RETRY_AFTER_S)}
    name = type(error).__name__
    return RefusalError(503, f"the replica that was answering is gone ({name})", code="replica_gone", headers=later)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _left(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def application(
    replica: Any,
    loader: Any,
    gate: GateOptions,
    *,
    n_replicas: int,
    slack: int,
    most_at_once: int,
    resources: dict[str, Any],
) -> Any:
    """Build what `ray.serve.run` takes.

    Parameters
    ----------
    replica, loader
        A replica's class, and what it is given.
    gate
        What the front lets in.
    n_replicas
        Processes with a model each.
    slack
        See `Affinity`.
    most_at_once
        Requests that a replica takes; the others wait at the front.
    resources
        What Ray reserves for a replica: `num_cpus`, `num_gpus`.
    """

    def front() -> ASGIApp:
        def handle() -> Any:
            return serve.get_deployment_handle(REPLICA)  # of this application, whatever its name

        return GateMiddleware(Front(handle), options=gate, state=GateState(), count=lambda _path, _status: None)

    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    replicas = serve.deployment(
        replica,
        name=REPLICA,
        num_replicas=n_replicas,
        max_ongoing_requests=most_at_once,
        ray_actor_options=resources,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        logging_config=quiet,
        request_router_config={"request_router_class": PrefixRouter, "request_router_kwargs": {"slack": slack}},
    )
    entrance = serve.deployment(
        serve.ingress(front)(),
        name="front",
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,  # the new one is there before the old one goes
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        logging_config=quiet,
    )
    return entrance.bind(replicas.bind(loader))
