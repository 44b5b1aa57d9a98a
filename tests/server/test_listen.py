"""The process around the application: it ends with the engine."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from hybridkv.server.gate import GateState
from hybridkv.server.listen import bind, is_loopback, run, url_of


def test_a_server_ends_with_its_engine() -> None:
    listener, ready = bind("127.0.0.1", 0), threading.Event()
    started = time.monotonic()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    def alive() -> bool:
        return time.monotonic() < started + 1

    ends = {"draining": lambda _: None, "stop_now": lambda: None}
    finished = run(app, listener, GateState(), ready=ready.set, alive=alive, **ends)
    assert ready.is_set()
    assert finished
    assert time.monotonic() > started + 1


def test_a_signal_that_follows_the_first_line_at_once_ends_it_in_order() -> None:
    """Whoever reads the address may stop the server right away: it ended by the signal, without an exit code."""
    missed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: missed.append(number))
    started = time.monotonic()
    state = GateState()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    try:
        ends = {"draining": lambda _: None, "stop_now": lambda: None, "alive": lambda: time.monotonic() < started + 30}
        finished = run(app, bind("127.0.0.1", 0), state, ready=lambda: signal.raise_signal(signal.SIGTERM), **ends)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (finished, state.stopping, missed) == (True, True, [])
    assert time.monotonic() < started + 20


def test_addresses() -> None:
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with bind(host, 0) as listener:
            assert is_loopback(listener) is local
            assert url_of(listener).startswith(("http://127.0.0.1:", "http://[::1]:", "http://0.0.0.0:"))
