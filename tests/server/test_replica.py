"""A replica's answer to Ray's question whether it is well, without any Ray running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from hybridkv.errors import AdmissionError

pytest.importorskip("ray", reason='ray is not installed: pip install "hybridkv[ray]"')
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own


class Engine:
    """A scheduler that does what it is told, at once, never, or not any more."""

    def __init__(self, state: str) -> None:
        self.state, self.asked = state, 0

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        self.asked += 1
        if self.state == "stopped":
            raise AdmissionError("the scheduler has stopped", reason="closed")
        future: Future[Any] = Future()
        if self.state == "well":
            future.set_result(work())
        return future

    def shutdown(self, *, drain: bool) -> None:
        assert not drain


def replica(state: str, ended: bool = False) -> tuple[Any, Engine]:
    from hybridkv.server.replica import Replica

    made, engine = object.__new__(Replica), Engine(state)
    made._scheduler, made._running, made._pool = engine, Future(), ThreadPoolExecutor(1)
    if ended:
        made._running.set_exception(MemoryError("no more"))
    return made, engine


def test_an_engine_that_answers_is_well() -> None:
    made, engine = replica("well")
    asyncio.run(made.check_health())
    assert engine.asked == 1


def test_an_engine_that_has_ended_is_not() -> None:
    with pytest.raises(RuntimeError, match="MemoryError"):
        asyncio.run(replica("well", ended=True)[0].check_health())
    with pytest.raises(AdmissionError):
        asyncio.run(replica("stopped")[0].check_health())


def test_an_engine_that_says_nothing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkv.server.replica.HEALTH_SECONDS", 0.05)
    with pytest.raises(TimeoutError):
        asyncio.run(replica("stuck")[0].check_health())
