"""`hybridkv serve --ray`: the same server as replicas on Ray Serve, on this machine or on a cluster.

Ray's own tools deploy the same through `ray_app.py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridkv.cli.fits import check_memory
from hybridkv.cli.model_options import open_model
from hybridkv.cli.ray_options import LOCAL, check_ray, connect
from hybridkv.cli.resolve import resolve_types
from hybridkv.cli.serve import EXIT_INTERRUPTED, check, demand, gate_options, load_served
from hybridkv.cli.show import model_path
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.cache import KVSpec
    from hybridkv.engine import Scheduler
    from hybridkv.policy import AnyPolicy, Guard
    from hybridkv.server.request_handler import Served

DEFAULT_REPLICAS = 2

_BEING_READ = 64
"""Requests that a replica may have beside those that run and wait, so that it is the one to refuse."""


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """A replica's way to its model: the options, and what was resolved from them before any was started."""

    options: argparse.Namespace
    specs: tuple[KVSpec, ...]
    guard: Guard

    def __call__(self) -> tuple[Served, Scheduler]:
        """Load it; what is worth knowing goes to the replica's stderr, which Ray keeps and passes on."""
        opened = open_model(self.options)
        opened = check_memory(opened, demand(self.options, opened, self.specs, self.guard))
        return load_served(self.options, opened, self.specs, self.guard)


def main(arguments: argparse.Namespace) -> int:
    """Check and deploy; on this machine, stay until a signal comes."""
    return serve(arguments, *check(arguments))


def serve(a: argparse.Namespace, policy: AnyPolicy, guard: Guard, keys: tuple[str, ...]) -> int:
    """Deploy; on this machine, stay until a signal comes. The exit code."""
    check_ray()
    if a.ray == LOCAL:
        from hybridkv.server.listen import bind

        listener = bind(a.host, a.port)  # so that a busy port is said at once; Ray listens itself
        a.port = listener.getsockname()[1]
        listener.close()
    deployment, name = ray_application(a, policy, guard, keys)
    n_gpus = int(a.device == "cuda")
    connect(a.ray, n_at_once=a.replicas, n_cpus=a.threads, n_gpus=n_gpus, what="replicas")
    import ray
    from ray import serve as ray_serve

    from hybridkv.server.cluster import APP

    stop = _on_signals() if a.ray == LOCAL else None
    options = {"host": a.host, "port": a.port, "keep_alive_timeout_s": 75}
    where = "HeadOnly" if a.ray == LOCAL else "EveryNode"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(proxy_location=where, http_options=options, logging_config={"log_level": "WARNING"})
    try:
        ray_serve.run(deployment, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise UsageError(
            f"Ray could not start the replicas: {error}", hint="the lines above say why; `serve status` has more"
        ) from error
    if stop is None:
        print(f"{name} on {a.replicas} replicas, until `serve shutdown`", file=sys.stderr, flush=True)
        return 0
    print(f"{name} at http://{a.host}:{a.port}, {a.replicas} replicas", file=sys.stderr, flush=True)
    stop.first.wait()
    ender = threading.Thread(target=_end, daemon=True)
    ender.start()
    while ender.is_alive() and not stop.second.wait(0.2):
        pass
    finished = not stop.second.is_set()
    ray.shutdown()
    return 0 if finished else EXIT_INTERRUPTED


def _end() -> None:
    """Let the replicas finish what they answer; what is left of Serve ends with this Ray."""
    from ray import serve as ray_serve

    from hybridkv.server.cluster import APP

    ray_serve.delete(APP)


@dataclass(frozen=True, slots=True)
class _Signals:
    first: threading.Event
    second: threading.Event


def _on_signals() -> _Signals:
    """Set handlers: the first signal drains, the second ends at once; Ray has handlers of its own until here."""
    signals = _Signals(threading.Event(), threading.Event())

    def note(*_: Any) -> None:
        (signals.second if signals.first.is_set() else signals.first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return signals


def ray_application(a: argparse.Namespace, policy: AnyPolicy, guard: Guard, keys: tuple[str, ...]) -> tuple[Any, str]:
    """Build what Ray deploys, and the model's name. Types are resolved before any replica is started.

    Raises
    ------
    UsageError
        For what several processes cannot do.
    """
    check_ray()
    if a.session_dir is not None:
        raise UsageError("--session-dir with --ray: a session belongs to one process", hint="leave --session-dir out")
    if ":" in a.device:
        raise UsageError(
            f"--device {a.device} with --ray; allowed: auto, cpu, cuda", hint="Ray assigns a device to each task"
        )
    a.replicas = DEFAULT_REPLICAS if a.replicas is None else a.replicas
    a.threads = max(1, (os.cpu_count() or 1) // a.replicas) if a.threads is None else a.threads
    if a.model is not None:
        a.model = str(model_path(a.model).resolve())  # a replica may be elsewhere
    opened = open_model(a)
    a.device = opened.device_type
    specs = resolve_types(opened, policy, guard)
    if a.ray == LOCAL:
        check_memory(opened, demand(a, opened, specs, guard))
    from hybridkv.server.cluster import application
    from hybridkv.server.listen import is_local_host
    from hybridkv.server.replica import Replica

    gate = gate_options(a, keys, local=a.ray == LOCAL and is_local_host(a.host), n_replicas=a.replicas)
    deployed = application(
        Replica,
        ModelLoader(a, specs, guard),
        gate,
        n_replicas=a.replicas,
        slack=a.parallel,
        most_at_once=a.parallel + a.max_waiting + _BEING_READ,
        resources={"num_cpus": a.threads, "num_gpus": int(opened.device_type == "cuda")},
    )
    return deployed, a.alias or opened.description.name
